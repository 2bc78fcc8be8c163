// Attention over selected blocks, and over all of them: tiles of neighbouring tokens walk the union of their blocks.
//
// The lanes of a vector are query rows: the heads of a group, of as many tokens as fit. So keys and values are read as
// they lie, one number broadcast at a time, no product needs a transposed copy, and the softmax runs down the keys in
// every lane at once. A tile's accumulators stay in the second-level cache while its blocks pass by; only the rows that
// chose a block meet it. Three classes multiply: VectorProducts anywhere, ManyRows and FewRows on matrix tiles.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "native/amx.h"
#include "native/simd.h"
#include "native/tensors.h"

namespace openm3 {
namespace {

// What a tile's queries and accumulators may take of the second-level cache.
constexpr std::int64_t TILE_BYTES = 1 << 20;
constexpr int MAX_TILE_TOKENS = 256;

struct Pool {
    const void* data;
    std::int64_t stride_m, stride_g, stride_b;

    template <class T>
    const T* block(std::int64_t page, int group) const {
        return static_cast<const T*>(data) + page * stride_m + group * stride_g;
    }
};

struct Call {
    const Batch& batch;
    Pool k, v;
    const void* q;
    std::int64_t stride_t, stride_n;
    // Null in dense layers.
    const std::int32_t* chosen;
    int num_chosen;
    int heads, groups, block, width;
    float scale;
    void* out;
    // Null if nobody asked.
    float* lse;
    int threads;

    int heads_per_group() const { return heads / groups; }
};

// How query rows of one group lie in vectors: `tokens` of them to a vector, or `vectors` to a token.
struct Packing {
    int tokens, vectors, heads;

    explicit Packing(int heads_per_group)
        : tokens(std::max(1, LANES / heads_per_group)), vectors((heads_per_group + LANES - 1) / LANES), heads(heads_per_group) {}
    int count(int num_tokens) const { return (num_tokens + tokens - 1) / tokens * vectors; }
    // The first token of vector v, and its first head.
    int token(int v) const { return v / vectors * tokens; }
    int head(int v) const { return v % vectors * LANES; }
};

// Some tokens of one request, one group, and which part of their blocks: what one thread does at a time.
struct Task {
    int request, group, tokens, part, parts;
    std::int64_t first;
    // Where the partial results go if there are several parts.
    std::int64_t partial;
};

std::size_t partial_floats(const Call& call, const Packing& packing, int tokens) {
    return std::size_t(packing.count(tokens)) * LANES * (call.width + 2);
}

// One block and a vector with rows that read it: bit i for the vector's i-th token.
struct Member {
    std::int32_t block, vector;
    std::uint32_t tokens;
};

class Scratch {
public:
    float* take(std::size_t count) {
        const std::size_t at = used_;
        used_ += (count + 15) / 16 * 16;
        if (used_ > size_) throw std::bad_alloc();
        return data_.get() + at;
    }
    void reserve(std::size_t count) {
        used_ = 0;
        if (count <= size_) return;
        data_.reset(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64)));
        if (!data_) throw std::bad_alloc();
        size_ = count;
    }

private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> data_;
    std::size_t size_ = 0, used_ = 0;
};

// ---- products

// A block's products with query rows, in ordinary vector arithmetic.
template <class T, class Q>
class VectorProducts {
public:
    // How many vectors of rows are multiplied at once.
    static constexpr int TOGETHER = LANES == 16 ? 3 : 2;

    struct Session {};

    VectorProducts(const Call& call, int vectors, Scratch& scratch)
        : call_(call),
          query_(scratch.take(std::size_t(vectors) * LANES * call.width)),
          wide_key_(scratch.take(std::size_t(call.block) * call.width)),
          wide_value_(scratch.take(std::size_t(call.block) * call.width)) {}

    static std::size_t floats(const Call& call, int vectors) {
        return std::size_t(vectors) * LANES * call.width + 2 * std::size_t(call.block) * call.width + 48;
    }

    // Vector v is to hold these rows; null for zeros.
    void read(int v, const Q* const* row) {
        float* to = query_ + std::size_t(v) * LANES * call_.width;
        for (int n = 0; n < LANES; n++)
            for (int h = 0; h < call_.width; h++) to[h * LANES + n] = row[n] ? to_float(row[n][h]) : 0.0f;
    }

    // From here on this block is meant, of which rows see at most `keys` keys; the next one comes after it.
    void open(const T* key, const T* value, int, const T*, const T*) {
        key_ = widened(key, call_.k.stride_b, wide_key_);
        value_ = widened(value, call_.v.stride_b, wide_value_);
    }

    void fetch_ahead() const {}

    // Called once when all blocks have passed: what `values` made of a vector becomes [channel][lane].
    void settle(float*) const {}

    // score[r][key][lane] = sum over h of key[h] * query[vector[r]][h][lane].
    template <int R>
    void scores(const int* vector, int keys, float* const* score) const {
        constexpr int N = rows_with(R);
        const float* query[R];
        for (int r = 0; r < R; r++) query[r] = query_ + std::size_t(vector[r]) * LANES * call_.width;
        int s = 0;
        for (; s < keys && s + N <= call_.block; s += N) key_products<N, R>(s, query, score);
        for (; s < keys; s++) key_products<1, R>(s, query, score);
    }

    // out[r][h][lane] = out * share[r] + sum over keys of value[key][h] * weight[r][key][lane].
    template <int R>
    void values(const float* const* weight, int keys, const vfloat* share, float* const* out) const {
        constexpr int N = rows_with(R);
        int h = 0;
        for (; h + N <= call_.width; h += N) value_products<N, R>(h, weight, keys, share, out);
        for (; h < call_.width; h++) value_products<1, R>(h, weight, keys, share, out);
    }

private:
    // Keys, or channels, multiplied together with R vectors: as many as keep the multipliers busy.
    static constexpr int rows_with(int r) { return (r == 1 ? 2 : 1) * (LANES == 16 ? 8 : 4); }

    struct Rows {
        const float* data;
        std::int64_t stride;
    };

    // Rows as floats, converted if they are not.
    Rows widened(const T* from, std::int64_t stride, float* wide) const {
        if constexpr (std::is_same_v<T, float>) return {from, stride};
        for (int s = 0; s < call_.block; s++) {
            const T* row = from + s * stride;
            float* to = wide + std::int64_t(s) * call_.width;
            int h = 0;
            for (; h + LANES <= call_.width; h += LANES) store(to + h, load(row + h));
            for (; h < call_.width; h++) to[h] = to_float(row[h]);
        }
        return {wide, call_.width};
    }

    template <int N, int R>
    void key_products(int first, const float* const* query, float* const* score) const {
        const float* key = key_.data + first * key_.stride;
        vfloat total[N][R] = {};
        for (int h = 0; h < call_.width; h++) {
            vfloat q[R];
            for (int r = 0; r < R; r++) q[r] = load(query[r] + h * LANES);
            for (int i = 0; i < N; i++) {
                const vfloat k = splat(key[i * key_.stride + h]);
                for (int r = 0; r < R; r++) total[i][r] += k * q[r];
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < N; i++) store(score[r] + (first + i) * LANES, total[i][r]);
    }

    template <int N, int R>
    void value_products(int first, const float* const* weight, int keys, const vfloat* share, float* const* out) const {
        const float* value = value_.data + first;
        vfloat total[N][R] = {};
        for (int s = 0; s < keys; s++) {
            vfloat p[R];
            for (int r = 0; r < R; r++) p[r] = load(weight[r] + s * LANES);
            for (int i = 0; i < N; i++) {
                const vfloat v = splat(value[s * value_.stride + i]);
                for (int r = 0; r < R; r++) total[i][r] += v * p[r];
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < N; i++) {
                float* to = out[r] + (first + i) * LANES;
                store(to, load(to) * share[r] + total[i][r]);
            }
    }

    const Call& call_;
    float *query_, *wide_key_, *wide_value_;
    Rows key_{}, value_{};
};

#if defined(__AMX_BF16__)

// f(0), f(1), .. f(N - 1), each a constant.
template <int N, class F>
inline void unroll(F&& f) {
    [&]<int... i>(std::integer_sequence<int, i...>) { (f(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// Two rows of 32 words become pairs of words: of channels paired_channel(0), (1), .. of the rows, and of those 4 further on.
inline vint pairs_low(vint even, vint odd) { return (vint)_mm512_unpacklo_epi16((__m512i)even, (__m512i)odd); }
inline vint pairs_high(vint even, vint odd) { return (vint)_mm512_unpackhi_epi16((__m512i)even, (__m512i)odd); }
constexpr int paired_channel(int i) { return i / 4 * 8 + i % 4; }

// The next block's keys and values, fetched into the second-level cache while this one is computed with. Both at once and
// a few lines at a time: one stream after the other, or many lines in a row, take up to twice as long.
struct Ahead {
    static constexpr int LINE = 64;
    const char *key, *value;
    int left;  // bytes of each

    void fetch(int pairs) {
        for (; pairs > 0 && left > 0; pairs--, left -= LINE, key += LINE, value += LINE)
            __builtin_prefetch(key, 0, 2), __builtin_prefetch(value, 0, 2);
    }
};

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

    void look_ahead(const bfloat16* key, const bfloat16* value) {
        ahead_ = {reinterpret_cast<const char*>(key), reinterpret_cast<const char*>(value), call_.block * call_.width * 2};
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

    void open(const bfloat16* key, const bfloat16* value, int keys, const bfloat16* next_key, const bfloat16* next_value) {
        Base::key_ = key;
        Base::look_ahead(next_key, next_value);
        for (int s = 0; s < keys; s += STEP)
            for (int h = 0; h < call_.width; h += STEP) transpose_values(value, s, std::min(STEP, keys - s), h);
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

    static bool takes(const Call& call) { return call.block % STEP == 0 && call.width % WIDE == 0; }

    FewRows(const Call& call, int vectors, Scratch& scratch)
        : Base(call, vectors, scratch),
          weight_(Base::halves(scratch, WEIGHT_PARTS * LANES * std::size_t(call.block))),
          pairs_(Base::halves(scratch, 2 * STEP * WIDE)) {}

    static std::size_t floats(const Call& call, int vectors) {
        return Base::query_floats(call, vectors) + WEIGHT_PARTS * LANES * std::size_t(call.block) / 2 + STEP * WIDE + 32;
    }

    void open(const bfloat16* key, const bfloat16* value, int, const bfloat16* next_key, const bfloat16* next_value) {
        Base::key_ = key, value_ = value;
        Base::look_ahead(next_key, next_value);
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

#endif

// ---- one tile

template <class T, class Q, class Products>
class Tile {
public:
    Tile(const Call& call, const Task& task, const Packing& packing, Scratch& scratch)
        : call_(call),
          task_(task),
          packing_(packing),
          vectors_(packing.count(task.tokens)),
          scratch_(reserved(scratch, call, vectors_)),
          products_(call, vectors_, scratch_) {
        const std::size_t rows = std::size_t(vectors_) * LANES;
        out_ = scratch.take(rows * call.width), top_ = scratch.take(rows), sum_ = scratch.take(rows);
        for (float*& score : score_) score = scratch.take(std::size_t(call.block) * LANES);
    }

    void run() {
        read_queries();
        std::fill_n(out_, std::size_t(vectors_) * LANES * call_.width, 0.0f);
        std::fill_n(top_, vectors_ * LANES, -INF);
        std::fill_n(sum_, vectors_ * LANES, 0.0f);
        if (call_.chosen) walk_chosen();
        else walk_all();
        for (int v = 0; v < vectors_; v++) products_.settle(out_ + std::size_t(v) * LANES * call_.width);
    }

    // Write the finished rows.
    void finish() const {
        for (int v = 0; v < vectors_; v++) {
            Q* to[LANES] = {};
            float share[LANES];
            for_lanes(v, [&](int lane, std::int64_t token, int head) {
                const float total = sum_[v * LANES + lane];
                share[lane] = total > 0.0f || total != total ? 1.0f / total : 0.0f;
                to[lane] = static_cast<Q*>(call_.out) + (token * call_.heads + head) * call_.width;
                if (call_.lse) call_.lse[token * call_.heads + head] = top_[v * LANES + lane] + std::log(total);
            });
            const float* from = out_ + std::size_t(v) * LANES * call_.width;
            int h = 0;
            for (; h + LANES <= call_.width; h += LANES) {
                vint row[LANES];
                for (int i = 0; i < LANES; i++) row[i] = (vint)load(from + (h + i) * LANES);
                transpose(row);
                for (int n = 0; n < LANES; n++)
                    if (to[n]) store(to[n] + h, (vfloat)row[n] * share[n]);
            }
            for (; h < call_.width; h++)
                for (int n = 0; n < LANES; n++)
                    if (to[n]) to[n][h] = from_float<Q>(from[h * LANES + n] * share[n]);
        }
    }

    // Partial results, to be merged: accumulators, then tops, then sums.
    void keep(float* to) const {
        const std::size_t rows = std::size_t(vectors_) * LANES;
        std::copy_n(out_, rows * call_.width, to);
        std::copy_n(top_, rows, to + rows * call_.width);
        std::copy_n(sum_, rows, to + rows * (call_.width + 1));
    }

    void merge(const float* parts, int count, std::size_t stride) {
        const std::size_t rows = std::size_t(vectors_) * LANES, width = call_.width;
        std::fill_n(out_, rows * width, 0.0f);
        for (std::size_t v = 0; v < rows; v += LANES) {
            vfloat top = splat(-INF), total{};
            for (int p = 0; p < count; p++) top = max(load(parts + p * stride + rows * width + v), top);
            const vfloat base = top == -INF ? splat(0.0f) : top;
            for (int p = 0; p < count; p++) {
                const float* part = parts + p * stride;
                const vfloat share = exp(load(part + rows * width + v) - base);
                total += load(part + rows * (width + 1) + v) * share;
                for (std::size_t h = 0; h < width; h++)
                    store(out_ + v * width + h * LANES, load(out_ + v * width + h * LANES) + load(part + v * width + h * LANES) * share);
            }
            store(top_ + v, top), store(sum_ + v, total);
        }
    }

private:
    static Scratch& reserved(Scratch& scratch, const Call& call, int vectors) {
        const std::size_t rows = std::size_t(vectors) * LANES;
        scratch.reserve(rows * (call.width + 2) + Products::TOGETHER * std::size_t(call.block) * LANES + 128 + Products::floats(call, vectors));
        return scratch;
    }

    // The rows of vector v: f(lane, token, head).
    template <class F>
    void for_lanes(int v, F&& f) const {
        for (int i = 0; i < packing_.tokens && packing_.token(v) + i < task_.tokens; i++)
            for (int n = 0; n < LANES && packing_.head(v) + n < packing_.heads; n++)
                f(i * packing_.heads + n, task_.first + packing_.token(v) + i, task_.group * packing_.heads + packing_.head(v) + n);
    }

    void read_queries() {
        for (int v = 0; v < vectors_; v++) {
            const Q* row[LANES] = {};
            for_lanes(v, [&](int lane, std::int64_t token, int head) {
                row[lane] = static_cast<const Q*>(call_.q) + token * call_.stride_t + head * call_.stride_n;
            });
            products_.read(v, row);
        }
    }

    std::int64_t position(int token) const { return call_.batch.position(task_.request, task_.first + token); }

    void walk_chosen() {
        std::vector<Member> members;
        members.reserve(std::size_t(task_.tokens) * call_.num_chosen * packing_.vectors);
        for (int t = 0; t < task_.tokens; t++) {
            const std::int32_t* chosen = call_.chosen + ((task_.first + t) * call_.groups + task_.group) * call_.num_chosen;
            const std::int64_t own = position(t) / call_.block;
            for (int k = 0; k < call_.num_chosen; k++)
                if (chosen[k] >= 0 && chosen[k] <= own)
                    for (int v = 0; v < packing_.vectors; v++)
                        members.push_back({chosen[k], t / packing_.tokens * packing_.vectors + v, 1u << t % packing_.tokens});
        }
        std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) {
            return a.block < b.block || (a.block == b.block && a.vector < b.vector);
        });
        std::size_t kept = 0;
        for (const Member& m : members) {
            if (kept && members[kept - 1].block == m.block && members[kept - 1].vector == m.vector) members[kept - 1].tokens |= m.tokens;
            else members[kept++] = m;
        }
        members.resize(kept);
        std::vector<std::size_t> begins;
        for (std::size_t i = 0; i < kept; i++)
            if (i == 0 || members[i].block != members[i - 1].block) begins.push_back(i);
        begins.push_back(kept);
        const std::size_t blocks = begins.size() - 1;
        for (std::size_t b = blocks * task_.part / task_.parts; b < blocks * (task_.part + 1) / task_.parts; b++)
            attend(&members[begins[b]], int(begins[b + 1] - begins[b]), members[begins[b + 1] < kept ? begins[b + 1] : begins[b]].block);
    }

    void walk_all() {
        const std::int64_t blocks = position(task_.tokens - 1) / call_.block + 1;
        std::vector<Member> members(vectors_);
        for (std::int64_t b = blocks * task_.part / task_.parts; b < blocks * (task_.part + 1) / task_.parts; b++) {
            for (int v = 0; v < vectors_; v++) members[v] = {std::int32_t(b), v, ~0u};
            attend(members.data(), vectors_, std::int32_t(std::min(b + 1, blocks - 1)));
        }
    }

    // One block meets the vectors that have rows reading it.
    void attend(const Member* members, int count, std::int32_t next) {
        const std::int64_t block = members[0].block, page = call_.batch.pages(task_.request)[block], next_page = call_.batch.pages(task_.request)[next];
        const std::int64_t keys = std::min<std::int64_t>(call_.block, position(task_.tokens - 1) + 1 - block * call_.block);
        products_.open(call_.k.block<T>(page, task_.group), call_.v.block<T>(page, task_.group), int(keys),
                       call_.k.block<T>(next_page, task_.group), call_.v.block<T>(next_page, task_.group));
        int i = 0;
        for (; i + Products::TOGETHER <= count; i += Products::TOGETHER) attend<Products::TOGETHER>(members + i);
        if constexpr (Products::TOGETHER == 3)
            if (i + 2 <= count) attend<2>(members + i), i += 2;
        for (; i < count; i++) attend<1>(members + i);
    }

    template <int R>
    void attend(const Member* members) {
        int vector[R], keys = 0;
        vint seen[R];
        for (int r = 0; r < R; r++) vector[r] = members[r].vector, seen[r] = visible(members[r], keys);
        if (keys == 0) return;
        products_.template scores<R>(vector, keys, score_);
        vfloat share[R];
        float* out[R];
        for (int r = 0; r < R; r++) {
            share[r] = softmax(score_[r], keys, seen[r], vector[r]);
            out[r] = out_ + std::size_t(vector[r]) * LANES * call_.width;
        }
        products_.template values<R>(score_, keys, share, out);
    }

    // How many of the block's keys each row sees; `keys` becomes the most that any does.
    vint visible(const Member& m, int& keys) const {
        vint seen{};
        for (int i = 0; i < packing_.tokens && packing_.token(m.vector) + i < task_.tokens; i++) {
            if (!(m.tokens >> i & 1)) continue;
            const std::int64_t last = position(packing_.token(m.vector) + i) - std::int64_t(m.block) * call_.block;
            const int count = int(std::clamp<std::int64_t>(last + 1, 0, call_.block));
            keys = std::max(keys, count);
            const int lanes = std::min(packing_.heads, LANES);
            for (int n = 0; n < lanes; n++) seen[i * packing_.heads % LANES + n] = count;
        }
        return seen;
    }

    // Scores become weights, in place; returns what earlier sums are to be multiplied with.
    vfloat softmax(float* score, int keys, vint seen, int vector) {
        vfloat top = load(top_ + vector * LANES);
        const vfloat before = top;
        const bool masked = bits(seen < keys) != 0;
        for (int s = 0; s < keys; s++) {
            vfloat x = load(score + s * LANES) * call_.scale;
            if (masked) x = splat(s) < seen ? x : splat(-INF);
            store(score + s * LANES, x);
            top = max(x, top);
        }
        const vfloat base = top == -INF ? splat(0.0f) : top;
        vfloat total{};
        for (int s = 0; s < keys; s++) {
            products_.fetch_ahead();
            const vfloat p = exp(load(score + s * LANES) - base);
            store(score + s * LANES, p);
            total += p;
        }
        const vfloat share = exp(before - base);
        store(top_ + vector * LANES, top);
        store(sum_ + vector * LANES, load(sum_ + vector * LANES) * share + total);
        return share;
    }

    const Call& call_;
    const Task& task_;
    const Packing& packing_;
    int vectors_;
    Scratch& scratch_;
    Products products_;
    float *out_, *top_, *sum_;
    float* score_[Products::TOGETHER];
};

// The work of a step. How a request is cut depends on nothing but itself and the threads, so that its results are the same
// to the last bit whatever else is in the batch. A request of few tasks is cut into parts of its blocks as well.
std::vector<Task> tasks_of(const Call& call, const Packing& packing, std::size_t& partials) {
    const std::int64_t row_bytes = std::int64_t(2) * call.width * 4 * LANES * packing.vectors / packing.tokens;
    const std::int64_t fit = std::clamp<std::int64_t>(TILE_BYTES / std::max<std::int64_t>(1, row_bytes), 1, MAX_TILE_TOKENS);
    const int wanted = call.threads == 1 ? 1 : 2 * call.threads;
    std::vector<Task> tasks;
    for (int r = 0; r < call.batch.requests; r++) {
        const std::int64_t count = call.batch.count(r), end = call.batch.start[r + 1];
        if (count == 0) continue;
        std::int64_t step = std::min(fit, std::max<std::int64_t>(16, count * call.groups / wanted));
        step = std::max<std::int64_t>(packing.tokens, step / packing.tokens * packing.tokens);
        const int own = int((count + step - 1) / step) * call.groups, parts = own >= wanted ? 1 : (wanted + own - 1) / own;
        for (std::int64_t first = call.batch.start[r]; first < end; first += step)
            for (int g = 0; g < call.groups; g++)
                for (int p = 0; p < parts; p++) {
                    const int tokens = int(std::min(step, end - first));
                    tasks.push_back({r, g, tokens, p, parts, first, std::int64_t(partials)});
                    if (parts > 1) partials += partial_floats(call, packing, tokens);
                }
    }
    return tasks;
}

template <class T, class Q, class Many, class Few = Many>
void attention_with(const Call& call) {
    const Packing packing(call.heads_per_group());
    std::size_t partials = 0;
    const std::vector<Task> tasks = tasks_of(call, packing, partials);
    std::vector<float> partial(partials);
    const std::int64_t count = std::int64_t(tasks.size());
    const auto run = [&](auto&& tile, const Task& task) {
        tile.run();
        if (task.parts == 1) tile.finish();
        else tile.keep(&partial[task.partial]);
    };
#pragma omp parallel num_threads(call.threads)
    {
        thread_local Scratch scratch;
        [[maybe_unused]] const typename Many::Session session;
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < count; i++) {
            if constexpr (!std::is_same_v<Many, Few>)
                if (packing.count(tasks[i].tokens) <= Few::MAX_VECTORS && Few::takes(call)) {
                    run(Tile<T, Q, Few>(call, tasks[i], packing, scratch), tasks[i]);
                    continue;
                }
            run(Tile<T, Q, Many>(call, tasks[i], packing, scratch), tasks[i]);
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t i = 0; i < count; i++) {
            const Task& task = tasks[i];
            if (task.parts == 1 || task.part != 0) continue;
            Tile<T, Q, Many> tile(call, task, packing, scratch);
            tile.merge(&partial[task.partial], task.parts, partial_floats(call, packing, task.tokens));
            tile.finish();
        }
    }
}

template <class T, class Q>
void attention(const Call& call) {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<T, bfloat16>)
        if (ManyRows<Q>::takes(call)) return attention_with<T, Q, ManyRows<Q>, FewRows<Q>>(call);
#endif
    attention_with<T, Q, VectorProducts<T, Q>>(call);
}

// ---- Python

Pool pool_of(const Tensor& x, const char* name) {
    expect(x, name, 4);
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

void check_chosen(const std::int32_t* chosen, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i++)
        if (chosen[i] < -1) throw std::invalid_argument("block ids must be -1 or more, not " + std::to_string(chosen[i]));
}

void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& page, const Tensor& start, const Tensor& length,
            std::optional<Tensor> chosen, float scale, const Tensor& out, std::optional<Tensor> lse, int threads) {
    expect(q, "q_TNH", 3);
    expect_dense(out, "out_TNH", 3);
    const Pool keys = pool_of(k, "k_MGBH"), values = pool_of(v, "v_MGBH");
    const std::int64_t tokens = std::int64_t(q.shape(0));
    for (int i = 0; i < 4; i++)
        if (k.shape(i) != v.shape(i)) throw std::invalid_argument("k and v differ in shape");
    if (q.shape(2) != k.shape(3) || k.shape(1) == 0 || q.shape(1) % k.shape(1) || q.shape(1) == 0)
        throw std::invalid_argument("q_TNH must be [T, N, H] with N a multiple of the groups of k");
    for (int i = 0; i < 3; i++)
        if (out.shape(i) != q.shape(i)) throw std::invalid_argument("out_TNH must be of the shape of q");
    const Batch batch = batch_of(page, start, length, tokens, std::int64_t(k.shape(0)), int(k.shape(2)));
    Call call{batch, keys, values, q.data(), q.stride(0), q.stride(1), nullptr, 0, int(q.shape(1)), int(k.shape(1)),
              int(k.shape(2)), int(k.shape(3)), scale, out.data(), nullptr, threads};
    if (chosen) {
        expect_dense(*chosen, "block_TGK", 3);
        if (std::int64_t(chosen->shape(0)) != tokens || chosen->shape(1) != k.shape(1))
            throw std::invalid_argument("block_TGK must be [T, G, K]");
        call.chosen = data_of<const std::int32_t>(*chosen, "block_TGK");
        call.num_chosen = int(chosen->shape(2));
        check_chosen(call.chosen, std::int64_t(chosen->size()));
    }
    if (lse) {
        expect_dense(*lse, "lse_TN", 2);
        if (std::int64_t(lse->shape(0)) != tokens || lse->shape(1) != q.shape(1)) throw std::invalid_argument("lse_TN must be [T, N]");
        call.lse = data_of<float>(*lse, "lse_TN");
    }
    const bool wide = is_float32(q), wide_cache = is_float32(k);
    if ((!wide && !is_bfloat16(q)) || (!wide_cache && !is_bfloat16(k)) || k.dtype() != v.dtype() || out.dtype() != q.dtype())
        throw std::invalid_argument("q, k and v must be float32 or bfloat16, out as q, v as k");
    nb::gil_scoped_release released;
    if (wide && wide_cache) attention<float, float>(call);
    else if (wide) attention<bfloat16, float>(call);
    else if (wide_cache) attention<float, bfloat16>(call);
    else attention<bfloat16, bfloat16>(call);
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention", &attend, nb::arg("q_TNH"), nb::arg("k_MGBH"), nb::arg("v_MGBH"), nb::arg("page_RP"), nb::arg("start_R1"),
          nb::arg("length_R"), nb::arg("block_TGK").none(), nb::arg("scale"), nb::arg("out_TNH"), nb::arg("lse_TN").none(),
          nb::arg("threads"), "Fill out_TNH, and lse_TN if given; every visible block where block_TGK is None.");
}

}  // namespace openm3
