// Products of weight rows with many tokens on matrix tiles, as product.h says: `Product` is the best that this level has.
//
// Tiles multiply bfloat16 and sum in float32. A number of more bits is cut into parts that are bfloat16 each, largest first:
// x = x1 + x2 + x3 to float32's last bit, or x1 + x2 to one in 2^17. Products of parts as small as the rounding are left out,
// so that float32 stays float32: six tile products instead of one still take a third of fused multiply-add's time. Parts of
// numbers next to the smallest are lost, as tiles take denormals for zero; an infinity that has parts beside it becomes NaN.
#pragma once

#include <array>

#include "native/amx.h"
#include "native/product.h"

namespace openm3 {

#if defined(__AMX_BF16__)

class Matrix {
public:
    using Packed = bfloat16;
    static constexpr int ROWS = TILE_ROWS;
    static constexpr int WIDTH = 2 * LANES;
    static constexpr int PANEL = 128;
    static constexpr int TILES_AT_ONCE = 16;
    // Channels of a whole panel that are multiplied at a time; of fewer rows there are more, as memory reads along a row.
    static constexpr int DEPTH = 512;
    static constexpr int MOST_PARTS = 3;
    static constexpr std::int64_t PANEL_SIZE = PANEL * DEPTH * MOST_PARTS;
    using Session = Tiles;

    static std::int64_t packed_size(std::int64_t columns, std::int64_t depth, int parts) {
        return columns * round_up(depth, STEP) * parts;
    }

    // Packs rows of x; columns after the last row repeat it. A vector of tokens is [steps][parts][16 pairs][16 tokens][2].
    template <class X>
    static void pack(const X* const* rows, const Tile& tile, std::int64_t depth, int parts, bfloat16* to) {
        with_parts(parts, [&]<int B>(Count<B>) {
            for (int first = 0; first < tile.width; first += LANES)
                for (std::int64_t k = 0; k < depth; k += STEP, to += B * TILE) {
                    vint part[B][LANES];
                    for (int i = 0; i < LANES; i++) {
                        const X* row = rows[std::min(first + i, tile.count - 1)] + k;
                        vint line[B];
                        split<B>(row, depth - k, line);
                        for (int j = 0; j < B; j++) part[j][i] = line[j];
                    }
                    for (int j = 0; j < B; j++) {
                        transpose(part[j]);
                        std::memcpy(to + j * TILE, part[j], sizeof part[j]);
                    }
                }
        });
    }

    // Packs `count` channels from an even one on, value(i, column) being LANES columns of the i-th.
    template <class Value>
    static void pack_channels(std::int64_t first, int count, int width, std::int64_t depth, int parts, bfloat16* to, Value value) {
        const std::int64_t steps = round_up(depth, STEP) / STEP;
        const int padded = first + count == depth ? int(steps * STEP - first) : count;
        with_parts(parts, [&]<int B>(Count<B>) {
            for (int column = 0; column < width; column += LANES)
                for (int i = 0; i < padded; i += 2) {
                    vint line[B];
                    split<B>(i < count ? value(i, column) : vfloat{}, i + 1 < count ? value(i + 1, column) : vfloat{}, line);
                    const std::int64_t k = first + i, tile = (column / LANES * steps + k / STEP) * B;
                    for (int j = 0; j < B; j++)
                        std::memcpy(to + (tile + j) * TILE + k % STEP * LANES, interleaved(line[j]), sizeof line[j]);
                }
        });
    }

    // Products of up to PANEL rows with packed tiles: c holds, tile after tile, [num_rows rounded up to ROWS][width]. The rows
    // wanted after these are `next` numbers on.
    template <class W, class T>
    static void multiply(const Row<W>* rows, int num_rows, std::int64_t depth, std::span<const T> tiles, const bfloat16* packed,
                         int parts, std::int64_t next, bfloat16* panel, float* c) {
        // A single tile is bound by reading the weights: few rows at a time, so that much of each is read at once.
        if (constexpr int few = 2 * ROWS; tiles.size() == 1 && num_rows > few) {
            for (int i = 0; i < num_rows; i += few, c += few * tiles[0].width) {
                const W* soon = i + few < num_rows ? rows[i + few].data : rows[0].data + next;
                multiply(rows + i, std::min(few, num_rows - i), depth, tiles, packed, parts, soon - rows[i].data, panel, c);
            }
            return;
        }
        with_parts(parts, [&]<int B>(Count<B>) {
            constexpr int A = std::is_same_v<W, bfloat16> ? 1 : std::max(2, B);
            const std::int64_t steps = round_up(depth, STEP) / STEP;
            const int padded = int(round_up(num_rows, ROWS));
            const int most = PANEL * DEPTH / STEP / padded;
            for (std::int64_t step = 0; step < steps; step += most) {
                const int count = int(std::min<std::int64_t>(most, steps - step));
                widen<A>(rows, num_rows, step * STEP, depth, count, panel);
                const std::int64_t soon = step + count < steps ? (step + count) * STEP : next;
                for (std::size_t t = 0; t < tiles.size(); t++) {
                    const Tile& tile = tiles[t];
                    const bfloat16* x = packed + packed_size(tile.column, depth, B) + step * B * TILE;
                    const bool two = tile.width == WIDTH, add = step > 0;
                    float* to = c + (tile.column - tiles[0].column) * padded;
                    const bfloat16* from = panel;
                    for (int i = 0; i < padded; i += 2 * ROWS, to += 2 * ROWS * tile.width, from += 2 * count * A * TILE) {
                        // Each tile fetches its share of the weights that are widened next.
                        Ahead ahead{{}, 0, STEP * sizeof(W)};
                        for (std::size_t r = 2 * ROWS * t / tiles.size(); r < 2 * ROWS * (t + 1) / tiles.size(); r++)
                            ahead.row[ahead.count++] =
                                reinterpret_cast<const char*>(rows[std::min(i + int(r), num_rows - 1)].data + soon);
                        const bool pair = i + ROWS < padded;
                        if (pair && two) products<A, B, 2, 2>(from, x, steps, count, to, add, ahead);
                        else if (pair) products<A, B, 2, 1>(from, x, steps, count, to, add, ahead);
                        else if (two) products<A, B, 1, 2>(from, x, steps, count, to, add, ahead);
                        else products<A, B, 1, 1>(from, x, steps, count, to, add, ahead);
                    }
                }
            }
        });
    }

    // Writes the products of a tile, as those of `multiply`, to rows of tokens.
    template <class T>
    static void write(const Tile& tile, const float* c, int num_rows, T* out, std::int64_t stride) {
        int done = 0;
        if constexpr (std::is_same_v<T, bfloat16>) {
            done = num_rows / STEP * STEP;
            for (int first = 0; first < tile.count; first += LANES)
                for (int row = 0; row < done; row += STEP) {
                    // Rounded in pairs of rows, so that half as many vectors are transposed.
                    vint x[LANES];
                    for (int i = 0; i < LANES; i++) {
                        vint line[1];
                        const float* pair = c + (row + 2 * i) * tile.width + first;
                        split<1>(load(pair), load(pair + tile.width), line);
                        x[i] = *interleaved(line[0]);
                    }
                    transpose(x);
                    for (int n = 0; n < std::min(LANES, tile.count - first); n++)
                        std::memcpy(out + (first + n) * stride + row, x + n, sizeof x[n]);
                }
        }
        Fma::write(tile, c + done * tile.width, num_rows - done, out + done, stride);
    }

private:
    // Channels and numbers of a tile.
    static constexpr int STEP = 32, TILE = TILE_ROWS * STEP;

    template <int N>
    using Count = std::integral_constant<int, N>;

    template <class F>
    static void with_parts(int parts, F run) {
        if (parts == 1) run(Count<1>{});
        else if (parts == 2) run(Count<2>{});
        else run(Count<MOST_PARTS>{});
    }

    // The parts of two vectors, those of `low` in the first 16 numbers of a line. What is not finite has one part.
    template <int N>
    static void split(vfloat low, vfloat high, vint (&line)[N]) {
        constexpr int NOT_FINITE = 0x99;
        line[0] = (vint)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        if constexpr (N > 1) {
            const __mmask16 odd_low = _mm512_fpclass_ps_mask((__m512)low, NOT_FINITE);
            const __mmask16 odd_high = _mm512_fpclass_ps_mask((__m512)high, NOT_FINITE);
            for (int j = 1; j < N; j++) {
                low = rest(low, _mm512_castsi512_si256((__m512i)line[j - 1]));
                high = rest(high, _mm512_extracti64x4_epi64((__m512i)line[j - 1], 1));
                if (odd_low | odd_high) [[unlikely]] {
                    low = (vfloat)_mm512_maskz_mov_ps(_knot_mask16(odd_low), (__m512)low);
                    high = (vfloat)_mm512_maskz_mov_ps(_knot_mask16(odd_high), (__m512)high);
                }
                line[j] = (vint)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            }
        }
    }

    static vfloat rest(vfloat x, __m256i part) {
        return x - (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
    }

    // The parts of the first `count` of STEP numbers, zeros behind them, each half times its own factor.
    template <int N, class X>
    static void split(const X* x, std::int64_t count, vint (&line)[N], float low = 1.0f, float high = 1.0f) {
        if constexpr (std::is_same_v<X, bfloat16> && N == 1) {
            line[0] = (vint)_mm512_maskz_loadu_epi16(count >= STEP ? ~0u : (1u << count) - 1, x);
        } else {
            const vfloat rest = count > LANES ? load_part(x + LANES, count - LANES) : vfloat{};
            split<N>(load_part(x, count) * low, rest * high, line);
        }
    }

    // A line of 16 numbers and 16 more as pairs of one of each.
    static vint* interleaved(vint& line) {
        alignas(64) static constexpr auto order = [] {
            std::array<std::uint16_t, 2 * LANES> lanes{};
            for (int i = 0; i < 2 * LANES; i++) lanes[i] = std::uint16_t(i / 2 + i % 2 * LANES);
            return lanes;
        }();
        line = (vint)_mm512_permutexvar_epi16(_mm512_load_si512(order.data()), (__m512i)line);
        return &line;
    }

    // Some steps of rows as tiles: [rows / 16][steps][A][16][STEP], the last row again where there are no more.
    template <int A, class W>
    static void widen(const Row<W>* rows, int num_rows, std::int64_t first, std::int64_t depth, int steps, bfloat16* to) {
        for (int i = 0; i < round_up(num_rows, ROWS); i++) {
            const Row<W>& row = rows[std::min(i, num_rows - 1)];
            bfloat16* line_to = to + i / ROWS * steps * A * TILE + i % ROWS * STEP;
            std::int64_t g = first / row.group, end = (g + 1) * row.group;
            const auto scale = [&](std::int64_t k) {
                if (!Row<W>::coded) return 1.0f;
                if (k >= end && k < depth) g++, end += row.group;
                return row.scale[g];
            };
            for (std::int64_t k = first; k < first + steps * STEP; k += STEP) {
                vint line[A];
                const float low = scale(k), high = scale(k + LANES);
                split<A>(row.data + k, depth - k, line, low, high);
                for (int j = 0; j < A; j++, line_to += TILE) std::memcpy(line_to, line + j, sizeof line[j]);
            }
        }
    }

    // Rows of weights of which `bytes` a step are fetched while others are multiplied.
    struct Ahead {
        const char* row[2 * ROWS];
        int count, bytes;

        void fetch(int step) const {
            for (int i = 0; i < count; i++)
                for (int at = 0; at < bytes; at += 64) __builtin_prefetch(row[i] + step * bytes + at, 0, 2);
        }
    };

    // c[row][token] (+)= the products of R rows of tiles and V vectors of tokens over `count` of a token's `steps`.
    template <int A, int B, int R, int V>
    static void products(const bfloat16* rows, const bfloat16* tokens, std::int64_t steps, int count, float* c, bool add,
                         const Ahead& ahead) {
        const int line = V * LANES * sizeof(float);
        float* below = c + TILE_ROWS * V * LANES;
        const bfloat16 *more_rows = rows + count * A * TILE, *more_tokens = tokens + steps * B * TILE;
        if (add) {
            tile_load<0>(c, line);
            if constexpr (V == 2) tile_load<1>(c + LANES, line);
            if constexpr (R == 2) tile_load<2>(below, line);
            if constexpr (R == 2 && V == 2) tile_load<3>(below + LANES, line);
        } else {
            tile_zero<0>();
            tile_zero<1>();
            tile_zero<2>();
            tile_zero<3>();
        }
        for (int step = 0; step < count; step++) {
            ahead.fetch(step);
            for (int j = 0; j < B; j++) {
                tile_load<6>(tokens + (step * B + j) * TILE, TILE_ROW_BYTES);
                if constexpr (V == 2) tile_load<7>(more_tokens + (step * B + j) * TILE, TILE_ROW_BYTES);
                for (int i = 0; i < std::min(A, std::max(A, B) - j); i++) {
                    const bool once = A == 1 && j > 0;
                    if (!once) tile_load<4>(rows + (step * A + i) * TILE, TILE_ROW_BYTES);
                    tile_product<0, 4, 6>();
                    if constexpr (V == 2) tile_product<1, 4, 7>();
                    if constexpr (R == 1) continue;
                    if (!once) tile_load<5>(more_rows + (step * A + i) * TILE, TILE_ROW_BYTES);
                    tile_product<2, 5, 6>();
                    if constexpr (V == 2) tile_product<3, 5, 7>();
                }
            }
        }
        tile_store<0>(c, line);
        if constexpr (V == 2) tile_store<1>(c + LANES, line);
        if constexpr (R == 2) tile_store<2>(below, line);
        if constexpr (R == 2 && V == 2) tile_store<3>(below + LANES, line);
    }
};

using Product = Matrix;

#else

using Product = Fma;

#endif

}  // namespace openm3
