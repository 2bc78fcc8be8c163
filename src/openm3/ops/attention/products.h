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

// A block's products with so few rows that they would leave most lanes empty: channels are in lanes instead.
template <class T, class Q>
class RowProducts {
public:
    static constexpr int TOGETHER = 1, MAX_ROWS = 6;

    struct Session {};

    static bool takes(const Call& call, int, int rows) {
        return rows <= std::min(MAX_ROWS, LANES / 2) && call.width % LANES == 0 && call.block % LANES == 0;
    }

    RowProducts(const Call& call, int, Scratch& scratch)
        : call_(call), query_(scratch.take(std::size_t(MAX_ROWS) * call.width)), turned_(scratch.take(std::size_t(MAX_ROWS) * call.width)) {}

    static std::size_t floats(const Call& call, int) { return 2 * std::size_t(MAX_ROWS) * call.width + 32; }

    void read(int, const Q* const* row) {
        for (rows_ = 0; rows_ < MAX_ROWS && row[rows_]; rows_++)
            for (int h = 0; h < call_.width; h++) query_[rows_ * call_.width + h] = to_float(row[rows_][h]);
    }

    void open(const T* key, const T* value, int, const T*, const T*) { key_ = key, value_ = value; }

    void fetch_ahead() const {}

    template <int>
    void scores(const int*, int keys, float* const* score) const {
        for (int s = 0; s < keys; s += LANES)
            for (int r = 0; r < rows_; r++) {
                const float* query = query_ + r * call_.width;
                vint dot[LANES];
                for (int i = 0; i < LANES; i++) {
                    const T* key = key_ + (s + i) * call_.k.stride_b;
                    vfloat total{};
                    for (int h = 0; h < call_.width; h += LANES) total += load(key + h) * load(query + h);
                    dot[i] = (vint)total;
                }
                transpose(dot);
                vfloat total = (vfloat)dot[0];
                for (int i = 1; i < LANES; i++) total += (vfloat)dot[i];
                float each[LANES];
                store(each, total);
                for (int i = 0; i < LANES; i++) score[0][(s + i) * LANES + r] = each[i];
            }
    }

    // Until `settle`, out[0] is [row][channel].
    template <int>
    void values(const float* const* weight, int keys, const vfloat* share, float* const* out) const {
        int r = 0;
        for (; r + 2 <= rows_; r += 2) add_values<2>(r, weight[0], keys, share[0], out[0]);
        if (r < rows_) add_values<1>(r, weight[0], keys, share[0], out[0]);
    }

    void settle(float* out) const {
        std::copy_n(out, rows_ * call_.width, turned_);
        std::fill_n(out, LANES * call_.width, 0.0f);
        for (int r = 0; r < rows_; r++)
            for (int h = 0; h < call_.width; h++) out[h * LANES + r] = turned_[r * call_.width + h];
    }

private:
    template <int R>
    void add_values(int row, const float* weight, int keys, vfloat share, float* out) const {
        constexpr int N = 4;
        int h = 0;
        for (; h + N * LANES <= call_.width; h += N * LANES) add_channels<R, N>(row, h, weight, keys, share, out);
        for (; h < call_.width; h += LANES) add_channels<R, 1>(row, h, weight, keys, share, out);
    }

    template <int R, int N>
    void add_channels(int row, int channel, const float* weight, int keys, vfloat share, float* out) const {
        vfloat total[R][N] = {};
        for (int s = 0; s < keys; s++) {
            const T* value = value_ + s * call_.v.stride_b + channel;
            for (int i = 0; i < N; i++) {
                const vfloat v = load(value + i * LANES);
                for (int r = 0; r < R; r++) total[r][i] += v * splat(weight[s * LANES + row + r]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < N; i++) {
                float* to = out + (row + r) * call_.width + channel + i * LANES;
                store(to, load(to) * share[row + r] + total[r][i]);
            }
    }

    const Call& call_;
    float *query_, *turned_;
    const T *key_ = nullptr, *value_ = nullptr;
    int rows_ = 0;
};

}  // namespace
}  // namespace openm3
