// What attention is called with, and a block's products with query rows on vectors. For cpu.cpp beside this file.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "native/batch.h"
#include "native/simd.h"

namespace openm3 {
namespace {

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

// A block's keys and values.
template <class T>
struct Place {
    const T *key = nullptr, *value = nullptr;
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

// The next block's keys and values, fetched into the second-level cache while this one is computed with. Both at once and
// a few lines at a time: one stream after the other, or many lines in a row, take up to twice as long.
struct Ahead {
    static constexpr int LINE = 64;
    const char *key, *value;
    int left;  // bytes of each

    template <class T>
    static Ahead of(Place<T> place, const Call& call) {
        const int bytes = place.key ? call.block * call.width * int(sizeof(T)) : 0;
        return {reinterpret_cast<const char*>(place.key), reinterpret_cast<const char*>(place.value), bytes};
    }

    void fetch(int pairs) {
        for (; pairs > 0 && left > 0; pairs--, left -= LINE, key += LINE, value += LINE)
            __builtin_prefetch(key, 0, 2), __builtin_prefetch(value, 0, 2);
    }
};

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
    void open(Place<T> block, int, Place<T>) {
        key_ = widened(block.key, call_.k.stride_b, wide_key_);
        value_ = widened(block.value, call_.v.stride_b, wide_value_);
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

}  // namespace
}  // namespace openm3
