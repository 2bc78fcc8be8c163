// A block's products with query rows on matrix tiles, as VectorProducts (products.h) makes them on vectors. For cpu.cpp beside
// this file.
#pragma once

#if defined(__AMX_BF16__)

#include <algorithm>
#include <type_traits>
#include <utility>

#include "attention/products.h"
#include "native/amx.h"

namespace openm3 {
namespace {

// f(0), f(1), .. f(N - 1), each a constant.
template <int N, class F>
inline void unroll(F&& f) {
    [&]<int... i>(std::integer_sequence<int, i...>) { (f(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// Two rows of 32 words become pairs of words: of channels paired_channel(0), (1), .. of the rows, and of those 4 further on.
inline vint pairs_low(vint even, vint odd) { return (vint)_mm512_unpacklo_epi16((__m512i)even, (__m512i)odd); }
inline vint pairs_high(vint even, vint odd) { return (vint)_mm512_unpackhi_epi16((__m512i)even, (__m512i)odd); }
constexpr int paired_channel(int i) { return i / 4 * 8 + i % 4; }

// The same on matrix tiles, for a cache of bfloat16. Float32 numbers are cut into bfloat16 parts that add up to them, so
// products stay exact: queries into as many as hold them whole, weights into three where the result is float32, two (an
// error of 2^-17) where it is bfloat16.
template <class Q>
class MatrixScores {
public:
    // What a thread needs while it multiplies.
    using Session = Tiles;

    void read(int v, const Q* const* row) {
        std::uint16_t* to = query(v, 0);
        for (int h = 0; h < call_.width; h += STEP) {
            vint part[QUERY_PARTS][LANES];
            for (int n = 0; n < LANES; n++) {
                if constexpr (QUERY_PARTS == 1) {
                    part[0][n] = row[n] ? load_words(row[n] + h) : vint{};
                } else {
                    vfloat low{}, high{};
                    if (row[n]) low = load(row[n] + h), high = load(row[n] + h + LANES);
                    for (int p = 0; p < QUERY_PARTS; p++) {
                        const vint a = top_half(low), b = top_half(high);
                        part[p][n] = top_words(a, b);
                        low -= (vfloat)a, high -= (vfloat)b;
                    }
                }
            }
            for (int p = 0; p < QUERY_PARTS; p++) {
                transpose(part[p]);
                for (int i = 0; i < LANES; i++) store_words(to + (std::size_t(p) * call_.width + h + 2 * i) * LANES, part[p][i]);
            }
        }
    }

    // To be called now and then by whoever computes between products.
    void fetch_ahead() { ahead_.fetch(1); }

    template <int R>
    void scores(const int* vector, int keys, float* const* score) {
        for (int s = 0; s < keys; s += STEP) key_products<R>(s, vector, score);
    }

protected:
    static constexpr int STEP = 32;  // numbers of the inner axis in one tile product
    static constexpr int QUERY_PARTS = std::is_same_v<Q, float> ? 3 : 1, WEIGHT_PARTS = std::is_same_v<Q, float> ? 3 : 2;

    MatrixScores(const Call& call, int vectors, Scratch& scratch)
        : call_(call), query_(halves(scratch, std::size_t(vectors) * QUERY_PARTS * LANES * call.width)) {}

    static std::size_t query_floats(const Call& call, int vectors) {
        return std::size_t(vectors) * QUERY_PARTS * LANES * call.width / 2 + 16;
    }

    static std::uint16_t* halves(Scratch& scratch, std::size_t count) {
        return reinterpret_cast<std::uint16_t*>(scratch.take((count + 1) / 2));
    }
    static vint load_words(const void* p) { return (vint)_mm512_loadu_si512(p); }
    static void store_words(void* p, vint x) { _mm512_storeu_si512(p, (__m512i)x); }

    // Weights of two keys as pairs of bfloat16 numbers, part by part.
    static void cut(vfloat even, vfloat odd, vint (&pair)[WEIGHT_PARTS]) {
        for (int p = 0; p < WEIGHT_PARTS; p++) {
            if (WEIGHT_PARTS == 2 && p == 1) even = rounded(even), odd = rounded(odd);
            const vint a = top_half(even), b = top_half(odd);
            pair[p] = (vint)_mm512_srli_epi32((__m512i)a, 16) | b;
            even -= (vfloat)a, odd -= (vfloat)b;
        }
    }

    // C[m][r] += A[m] * (the sum of the parts of B[r]) for two tiles of A, the second `next` numbers on, rows `stride` apart.
    template <int R, int PARTS, class T, class F>
    void multiply(const T* a, std::int64_t next, std::int64_t stride, F&& b) {
        unroll<2>([&](auto m) { tile_load<4 + m>(a + m * next, stride * 2); });
        unroll<PARTS>([&](auto p) {
            unroll<R>([&](auto r) {
                tile_load<6 + r>(b(r, p), TILE_ROW_BYTES);
                unroll<2>([&](auto m) {
                    tile_product<m * R + r, 4 + m, 6 + r>();
                    ahead_.fetch(6);
                });
            });
        });
    }

    const Call& call_;
    const bfloat16* key_ = nullptr;
    Ahead ahead_{};

private:
    // STEP keys from `first` on.
    template <int R>
    void key_products(int first, const int* vector, float* const* score) {
        unroll<2 * R>([](auto i) { tile_zero<i>(); });
        const bfloat16* key = key_ + first * call_.k.stride_b;
        for (int h = 0; h < call_.width; h += STEP)
            multiply<R, QUERY_PARTS>(key + h, LANES * call_.k.stride_b, call_.k.stride_b,
                                     [&](int r, int p) { return query(vector[r], p) + h * LANES; });
        unroll<2 * R>([&](auto i) { tile_store<i>(score[i % R] + (first + i / R * LANES) * LANES, TILE_ROW_BYTES); });
    }

    // [width / 2][lane][2]
    std::uint16_t* query(int v, int p) const { return query_ + (std::size_t(v) * QUERY_PARTS + p) * LANES * call_.width; }

    // A float32's bfloat16 part, the rest cut off; or rounded, if it is the last.
    static vint top_half(vfloat x) { return (vint)x & std::int32_t(0xffff0000); }
    static vfloat rounded(vfloat x) { return (vfloat)((vint)x + 0x8000); }

    // The upper words of 32 numbers, in their order.
    static vint top_words(vint a, vint b) {
        const auto low = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)a, 16)), high = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)b, 16));
        return (vint)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }

    std::uint16_t* query_;
};

// Many rows meet a block: its values are transposed once, so that weights are multiplied as they come.
template <class Q>
class ManyRows : public MatrixScores<Q> {
    using Base = MatrixScores<Q>;
    using Base::call_, Base::ahead_, Base::STEP, Base::WEIGHT_PARTS, Base::load_words, Base::store_words;

public:
    static constexpr int TOGETHER = 2;

    static bool takes(const Call& call) { return call.block % STEP == 0 && call.width % STEP == 0; }

    ManyRows(const Call& call, int vectors, Scratch& scratch)
        : Base(call, vectors, scratch),
          weight_(Base::halves(scratch, TOGETHER * WEIGHT_PARTS * LANES * std::size_t(call.block))),
          value_(Base::halves(scratch, std::size_t(call.block) * call.width)) {}

    static std::size_t floats(const Call& call, int vectors) {
        return Base::query_floats(call, vectors) + (TOGETHER * WEIGHT_PARTS * LANES + std::size_t(call.width)) * call.block / 2 + 32;
    }

    void open(Place<bfloat16> block, int keys, Place<bfloat16> ahead) {
        Base::key_ = block.key, ahead_ = Ahead::of(ahead, call_);
        for (int s = 0; s < keys; s += STEP)
            for (int h = 0; h < call_.width; h += STEP) transpose_values(block.value, s, std::min(STEP, keys - s), h);
    }

    template <int R>
    void values(const float* const* weight, int keys, const vfloat* share, float* const* out) {
        for (int r = 0; r < R; r++) {
            for (int s = 0; s < (keys + STEP - 1) / STEP * STEP; s += 2) {
                vint pair[WEIGHT_PARTS];
                Base::cut(s < keys ? load(weight[r] + s * LANES) : vfloat{}, s + 1 < keys ? load(weight[r] + (s + 1) * LANES) : vfloat{}, pair);
                for (int p = 0; p < WEIGHT_PARTS; p++) store_words(part(r, p) + s * LANES, pair[p]);
            }
            if (bits(share[r] != 1.0f))
                for (int h = 0; h < call_.width; h++) store(out[r] + h * LANES, load(out[r] + h * LANES) * share[r]);
        }
        for (int h = 0; h < call_.width; h += STEP) value_products<R>(h, keys, out);
    }

    void settle(float*) const {}

private:
    // STEP channels from `first` on.
    template <int R>
    void value_products(int first, int keys, float* const* out) {
        const auto place = [&](int i) { return out[i % R] + (first + i / R * LANES) * LANES; };
        unroll<2 * R>([&](auto i) { tile_load<i>(place(i), TILE_ROW_BYTES); });
        for (int s = 0; s < keys; s += STEP)
            Base::template multiply<R, WEIGHT_PARTS>(value_ + std::size_t(first) * call_.block + s, LANES * call_.block, call_.block,
                                                     [&](int r, int p) { return part(r, p) + s * LANES; });
        unroll<2 * R>([&](auto i) { tile_store<i>(place(i), TILE_ROW_BYTES); });
    }

    // value_[h][key] for STEP keys and channels; keys that nobody sees, whatever lies there, as zeros.
    void transpose_values(const bfloat16* value, int first, int keys, int h) {
        vint low[LANES], high[LANES];
        const bfloat16* row = value + first * call_.v.stride_b + h;
        for (int i = 0; i < LANES; i++, row += 2 * call_.v.stride_b) {
            const vint even = 2 * i < keys ? load_words(row) : vint{}, odd = 2 * i + 1 < keys ? load_words(row + call_.v.stride_b) : vint{};
            low[i] = pairs_low(even, odd), high[i] = pairs_high(even, odd);
        }
        transpose(low), transpose(high);
        for (int i = 0; i < LANES; i++) {
            store_words(value_ + std::size_t(h + paired_channel(i)) * call_.block + first, low[i]);
            store_words(value_ + std::size_t(h + paired_channel(i) + 4) * call_.block + first, high[i]);
        }
    }

    // [block / 2][lane][2]
    std::uint16_t* part(int r, int p) const { return weight_ + (std::size_t(r) * WEIGHT_PARTS + p) * LANES * call_.block; }

    std::uint16_t *weight_, *value_;
};

// A few rows meet a block once: it is cheaper to transpose the weights. Results are gathered row by row, tile by tile.
template <class Q>
class FewRows : public MatrixScores<Q> {
    using Base = MatrixScores<Q>;
    using Base::call_, Base::ahead_, Base::STEP, Base::WEIGHT_PARTS, Base::load_words, Base::store_words;

public:
    static constexpr int TOGETHER = 1;
    static constexpr int MAX_VECTORS = 3;

    static bool takes(const Call& call, int vectors, int) {
        return vectors <= MAX_VECTORS && call.block % STEP == 0 && call.width % WIDE == 0;
    }

    FewRows(const Call& call, int vectors, Scratch& scratch)
        : Base(call, vectors, scratch),
          weight_(Base::halves(scratch, WEIGHT_PARTS * LANES * std::size_t(call.block))),
          pairs_(Base::halves(scratch, 2 * STEP * WIDE)) {}

    static std::size_t floats(const Call& call, int vectors) {
        return Base::query_floats(call, vectors) + WEIGHT_PARTS * LANES * std::size_t(call.block) / 2 + STEP * WIDE + 32;
    }

    void open(Place<bfloat16> block, int, Place<bfloat16> ahead) {
        Base::key_ = block.key, value_ = block.value, ahead_ = Ahead::of(ahead, call_);
    }

    template <int R>
    void values(const float* const* weight, int keys, const vfloat* share, float* const* out) {
        for (int s = 0; s < keys; s += STEP) cut_weights(weight[0], s, keys);
        if (bits(share[0] != 1.0f))
            for (int h = 0; h < call_.width; h++)
                store(out[0] + h * LANES, load(out[0] + h * LANES) * splat(share[0][h % LANES]));
        for (int h = 0; h < call_.width; h += WIDE) {
            float* to = out[0] + h * LANES;
            unroll<4>([&](auto i) { tile_load<i>(to + i * LANES * LANES, TILE_ROW_BYTES); });
            for (int s = 0; s < keys; s += STEP) {
                std::uint16_t* pairs = pairs_ + s / STEP % 2 * STEP * WIDE;
                pair_values(s, std::min(STEP, keys - s), h, pairs);
                unroll<WEIGHT_PARTS>([&](auto p) { tile_load<4 + p>(weight_ + std::size_t(p) * LANES * call_.block + s, call_.block * 2); });
                unroll<4>([&](auto i) {
                    tile_load<7>(pairs + i * LANES * STEP, TILE_ROW_BYTES);
                    unroll<WEIGHT_PARTS>([&](auto p) { tile_product<i, 4 + p, 7>(); });
                });
            }
            unroll<4>([&](auto i) { tile_store<i>(to + i * LANES * LANES, TILE_ROW_BYTES); });
        }
    }

    // From tiles of [lane][channel] to [channel][lane].
    void settle(float* out) const {
        for (int h = 0; h < call_.width; h += STEP, out += STEP * LANES) {
            vint low[LANES], high[LANES];
            for (int n = 0; n < LANES; n++) low[n] = load_words(out + n * LANES), high[n] = load_words(out + (n + LANES) * LANES);
            transpose(low), transpose(high);
            for (int i = 0; i < LANES; i++) store_words(out + paired_channel(i) * LANES, low[i]), store_words(out + (paired_channel(i) + 4) * LANES, high[i]);
        }
    }

private:
    static constexpr int WIDE = 64;  // channels in four tiles

    // weight_[part][lane][key] for STEP keys.
    void cut_weights(const float* weight, int first, int keys) {
        vint pair[LANES][WEIGHT_PARTS];
        for (int i = 0, s = first; i < LANES; i++, s += 2) {
            ahead_.fetch(1);
            Base::cut(s < keys ? load(weight + s * LANES) : vfloat{}, s + 1 < keys ? load(weight + (s + 1) * LANES) : vfloat{}, pair[i]);
        }
        for (int p = 0; p < WEIGHT_PARTS; p++) {
            vint row[LANES];
            for (int i = 0; i < LANES; i++) row[i] = pair[i][p];
            transpose(row);
            for (int n = 0; n < LANES; n++) store_words(weight_ + (std::size_t(p) * LANES + n) * call_.block + first, row[n]);
        }
    }

    // Neighbouring keys' values side by side, in four tiles; keys that nobody sees, whatever lies there, as zeros.
    void pair_values(int first, int keys, int h, std::uint16_t* to) {
        const bfloat16* row = value_ + first * call_.v.stride_b + h;
        for (int i = 0; i < LANES; i++, row += 2 * call_.v.stride_b, to += STEP) {
            ahead_.fetch(1);
            for (int half = 0; half < 2; half++) {
                const bfloat16* at = row + half * STEP;
                const vint even = 2 * i < keys ? load_words(at) : vint{}, odd = 2 * i + 1 < keys ? load_words(at + call_.v.stride_b) : vint{};
                store_words(to + (2 * half) * LANES * STEP, pairs_low(even, odd)), store_words(to + (2 * half + 1) * LANES * STEP, pairs_high(even, odd));
            }
        }
    }

    std::uint16_t *weight_, *pairs_;
    const bfloat16* value_ = nullptr;
};

}  // namespace
}  // namespace openm3

#endif
