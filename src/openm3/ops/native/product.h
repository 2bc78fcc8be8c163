// Products of weight rows with many tokens: what experts and linear layers share.
//
// Tokens are packed once, in tiles of some columns, one column a token. Weights are met row by row as they are stored and
// widened a panel at a time. A product comes out as [rows][columns], which is how the next product wants its tokens.
// Two classes with the same members do it: `Fma` on vectors, in float32, and `Matrix` (matrix.h) on matrix tiles, where the
// processor has them. Every order of summation depends on the depth alone.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <span>

#include "native/simd.h"

namespace openm3 {

constexpr std::int64_t round_up(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

// Uninitialised numbers on a cache line's border.
struct Free {
    void operator()(void* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class T>
using Array = std::unique_ptr<T[], Free>;

template <class T>
Array<T> array(std::int64_t count) {
    return Array<T>(new (std::align_val_t(64)) T[std::size_t(count)]);
}

// ---- vectors

inline float to_float(std::int8_t x) { return x; }

inline vfloat load(const std::int8_t* p) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    typedef std::int8_t vbyte __attribute__((vector_size(LANES)));
    vbyte x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, vfloat);
#endif
}

// The first `count` lanes from memory, zero in the others.
template <class T>
inline vfloat load_part(const T* p, std::int64_t count) {
    if (count >= LANES) return load(p);
    T part[LANES] = {};
    std::memcpy(part, p, std::size_t(count) * sizeof(T));
    return load(part);
}

// The first `count` lanes to memory.
template <class T>
inline void store_part(T* p, vfloat x, std::int64_t count) {
    if (count >= LANES) return store(p, x);
    T part[LANES];
    store(part, x);
    std::memcpy(p, part, std::size_t(count) * sizeof(T));
}

// ---- weights

// A weight row: numbers as they are stored, times a scale for each `group` neighbours if they are int8 codes. A group is
// a multiple of 16, or the whole row; rows without scales are one group.
template <class W>
struct Row {
    static constexpr bool coded = std::is_same_v<W, std::int8_t>;

    const W* data;
    const float* scale;
    std::int64_t group;

    // Some numbers in float32.
    void widen(std::int64_t first, std::int64_t count, float* to) const {
        const W* from = data + first;
        std::int64_t g = first / group;
        for (std::int64_t i = 0; i < count; g++) {
            const std::int64_t end = std::min((g + 1) * group - first, count);
            const float by = coded ? scale[g] : 1.0f;
            for (; i + LANES <= end; i += LANES) store(to + i, coded ? load(from + i) * by : load(from + i));
            for (; i < end; i++) to[i] = coded ? to_float(from[i]) * by : to_float(from[i]);
        }
    }
};

// Tokens that are multiplied together: `count` of them, in columns `column`.. of all that are packed. They take `width`
// columns, a multiple of LANES; those after the last token hold anything.
struct Tile {
    int count, width;
    std::int64_t column;
};

// Calls use(token, row, x, lanes) for the products [num_rows][width] of a tile: x holds those of one token and LANES rows
// from `row` on, of which `lanes` are there.
template <class Use>
void by_token(const Tile& tile, const float* c, int num_rows, Use use) {
    for (int first = 0; first < tile.count; first += LANES) {
        for (int row = 0; row < num_rows; row += LANES) {
            const int lanes = std::min(LANES, num_rows - row);
            vfloat x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = load(c + std::min(row + i, num_rows - 1) * tile.width + first);
            transpose(x);
            for (int n = 0; n < std::min(LANES, tile.count - first); n++) use(first + n, row, x[n], lanes);
        }
    }
}

// ---- on vectors

// A vector holds one channel of LANES tokens: each weight is broadcast from where it lies, and ROWS rows by up to three
// vectors of products stay in registers. Tokens are packed as [depth][width].
class Fma {
public:
    using Packed = float;
    static constexpr int ROWS = REGISTERS == 32 ? 8 : 4;
    static constexpr int WIDTH = 3 * LANES;
    static constexpr int PANEL = 64;
    // Tiles multiplied with a panel of weights at a time: their products stay in the second-level cache.
    static constexpr int TILES_AT_ONCE = 8;
    // Channels multiplied at a time: those of a tile, and of a panel of weights, stay in the second-level cache.
    static constexpr int DEPTH = 1024;
    static constexpr std::int64_t PANEL_SIZE = PANEL * DEPTH;

    // What a thread holds while it multiplies.
    struct Session {
        Session() {}
    };

    static std::int64_t packed_size(std::int64_t columns, std::int64_t depth, int) { return columns * depth; }

    // Packs rows of x; columns after the last row repeat it.
    template <class X>
    static void pack(const X* const* rows, const Tile& tile, std::int64_t depth, int, float* to) {
        const int width = tile.width;
        for (int first = 0; first < width; first += LANES) {
            const X* row[LANES];
            for (int i = 0; i < LANES; i++) row[i] = rows[std::min(first + i, tile.count - 1)];
            std::int64_t k = 0;
            for (; k + LANES <= depth; k += LANES) {
                vfloat x[LANES];
                for (int i = 0; i < LANES; i++) x[i] = load(row[i] + k);
                transpose(x);
                for (int i = 0; i < LANES; i++) store(to + (k + i) * width + first, x[i]);
            }
            for (; k < depth; k++)
                for (int i = 0; i < LANES; i++) to[k * width + first + i] = to_float(row[i][k]);
        }
    }

    // Packs `count` channels from `first` on, value(i, column) being LANES columns of the i-th.
    template <class Value>
    static void pack_channels(std::int64_t first, int count, int width, std::int64_t, int, float* to, Value value) {
        for (int i = 0; i < count; i++)
            for (int column = 0; column < width; column += LANES) store(to + (first + i) * width + column, value(i, column));
    }

    // Products of up to PANEL rows with packed tiles: c holds, tile after tile, [num_rows rounded up to ROWS][width]. The rows
    // wanted after these are `next` numbers on.
    template <class W, class T>
    static void multiply(const Row<W>* rows, int num_rows, std::int64_t depth, std::span<const T> tiles, const float* packed, int,
                         std::int64_t next, float* panel, float* c) {
        const int padded = int(round_up(num_rows, ROWS));
        const float* from[PANEL + ROWS];
        for (std::int64_t k = 0; k < depth; k += DEPTH) {
            const std::int64_t span = std::min<std::int64_t>(DEPTH, depth - k);
            for (const T& tile : tiles) {
                const bool first = &tile == tiles.data();
                const float* x = packed + tile.column * depth + k * tile.width;
                float* to = c + (tile.column - tiles[0].column) * padded;
                for (int i = 0; i < padded; i += ROWS, to += ROWS * tile.width) {
                    Ahead ahead{{}, std::int64_t(LANES * sizeof(W))};
                    for (int j = i; first && j < i + ROWS; j++) {
                        const Row<W>& row = rows[std::min(j, num_rows - 1)];
                        if constexpr (!std::is_same_v<W, float>) row.widen(k, span, panel + j * DEPTH);
                        from[j] = std::is_same_v<W, float> ? reinterpret_cast<const float*>(row.data) + k : panel + j * DEPTH;
                        const bool last = j + ROWS >= padded;
                        const W* soon = rows[std::min(last ? j % ROWS : j + ROWS, num_rows - 1)].data;
                        soon += !last ? k : k + span < depth ? k + span : next;
                        ahead.row[j - i] = reinterpret_cast<const char*>(soon);
                    }
                    const Ahead* soon = first ? &ahead : nullptr;
                    if (tile.width == LANES) products<1>(from + i, x, span, to, k > 0, soon);
                    else if (tile.width == 2 * LANES) products<2>(from + i, x, span, to, k > 0, soon);
                    else products<3>(from + i, x, span, to, k > 0, soon);
                }
            }
        }
    }

    // Writes the products of a tile, as those of `multiply`, to rows of tokens.
    template <class T>
    static void write(const Tile& tile, const float* c, int num_rows, T* out, std::int64_t stride) {
        by_token(tile, c, num_rows, [&](int n, int row, vfloat x, int lanes) { store_part(out + n * stride + row, x, lanes); });
    }

private:
    // Products that are added one after the other: longer sums are made of several, for the rounding's sake.
    static constexpr int LONGEST_SUM = 256;

    // Weights that are wanted soon: `bytes` for every LANES channels of each of ROWS rows are fetched while others are used.
    struct Ahead {
        const char* row[ROWS];
        std::int64_t bytes;

        void fetch(std::int64_t k) const {
            for (int i = 0; i < ROWS; i++) __builtin_prefetch(row[i] + k / LANES * bytes, 0, 2);
        }
    };

    // c[i][token] (+)= rows[i] . x for ROWS rows and a tile of V vectors of tokens; x holds [depth][V * LANES].
    template <int V>
    static void products(const float* const* rows, const float* x, std::int64_t depth, float* c, bool add, const Ahead* ahead) {
        const float* row[ROWS];
        for (int i = 0; i < ROWS; i++) row[i] = rows[i];
        for (std::int64_t k = 0; k < depth; add = true) {
            const std::int64_t end = std::min<std::int64_t>(k + LONGEST_SUM, depth);
            vfloat total[ROWS][V] = {};
            while (k < end) {
                if (ahead) ahead->fetch(k);
                for (const std::int64_t stop = std::min(k + LANES, end); k < stop; k++) {
                    vfloat token[V];
                    for (int v = 0; v < V; v++) token[v] = load(x + (k * V + v) * LANES);
                    for (int i = 0; i < ROWS; i++) {
                        const float weight = row[i][k];
                        for (int v = 0; v < V; v++) total[i][v] += weight * token[v];
                    }
                }
            }
            for (int i = 0; i < ROWS; i++)
                for (int v = 0; v < V; v++) {
                    float* to = c + (i * V + v) * LANES;
                    store(to, add ? load(to) + total[i][v] : total[i][v]);
                }
        }
    }
};

}  // namespace openm3
