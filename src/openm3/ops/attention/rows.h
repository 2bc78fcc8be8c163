// A block and so few query rows that they would leave most lanes of VectorProducts (products.h) empty: channels are in lanes
// where keys and values are multiplied, and keys where weights are computed. For cpu.cpp beside this file.
#pragma once

#include <algorithm>

#include "attention/products.h"

namespace openm3 {
namespace {

template <class T, class Q>
class RowProducts {
public:
    static constexpr int TOGETHER = 1, MAX_ROWS = std::min(6, LANES);

    struct Session {};

    static bool takes(const Call& call, int, int rows) {
        return rows <= MAX_ROWS && call.width % LANES == 0 && call.block % LANES == 0;
    }

    RowProducts(const Call& call, int, Scratch& scratch)
        : call_(call),
          query_(scratch.take(std::size_t(MAX_ROWS) * call.width)),
          turned_(scratch.take(std::size_t(MAX_ROWS) * call.width)),
          score_(scratch.take(std::size_t(MAX_ROWS) * call.block)) {}

    static std::size_t floats(const Call& call, int) { return std::size_t(MAX_ROWS) * (2 * call.width + call.block) + 48; }

    void read(int, const Q* const* row) {
        for (rows_ = 0; rows_ < MAX_ROWS && row[rows_]; rows_++)
            for (int h = 0; h < call_.width; h++) query_[rows_ * call_.width + h] = to_float(row[rows_][h]);
    }

    void open(Place<T> block, int, Place<T> ahead) { key_ = block.key, value_ = block.value, ahead_ = Ahead::of(ahead, call_); }

    // The block's `keys` keys, of which row r sees the first seen[r], are added to each row's top score, sum and output,
    // which is out[row * width + channel] until `settle`.
    void meet(int keys, vint seen, float* top, float* sum, float* out) {
        in_pairs([&](auto count, int r) { scores<count>(r, keys); });
        float high[LANES], total[LANES] = {}, share[LANES];
        const vfloat before = load(top);
        store(high, before);
        for (int r = 0; r < rows_; r++) high[r] = masked(r, keys, seen[r], high[r]);
        const vfloat now = load(high), base = now == -INF ? splat(0.0f) : now, factor = exp(before - base);
        for (int r = 0; r < rows_; r++) total[r] = weights(r, keys, base[r]);
        store(top, now), store(sum, load(sum) * factor + load(total)), store(share, factor);
        in_pairs([&](auto count, int r) { values<count>(r, keys, share, out); });
    }

    void settle(float* out) const {
        std::copy_n(out, rows_ * call_.width, turned_);
        std::fill_n(out, LANES * call_.width, 0.0f);
        for (int r = 0; r < rows_; r++)
            for (int h = 0; h < call_.width; h++) out[h * LANES + r] = turned_[r * call_.width + h];
    }

private:
    // f(2, r) for the rows r and r + 1, and f(1, r) for one that is left.
    template <class F>
    void in_pairs(F&& f) {
        int r = 0;
        for (; r + 2 <= rows_; r += 2) f(std::integral_constant<int, 2>{}, r);
        if (r < rows_) f(std::integral_constant<int, 1>{}, r);
    }

    float* score(int row) const { return score_ + row * call_.block; }

    template <int R>
    void scores(int row, int keys) {
        constexpr int N = LANES / R;  // keys whose sums one vector holds, for R rows
        for (int s = 0; s < keys; s += N) {
            ahead_.fetch(2 * N);
            vfloat dot[LANES] = {};
            for (int h = 0; h < call_.width; h += LANES) {
                vfloat q[R];
                for (int r = 0; r < R; r++) q[r] = load(query_ + (row + r) * call_.width + h);
                for (int i = 0; i < N; i++) {
                    const vfloat k = load(key_ + (s + i) * call_.k.stride_b + h);
                    for (int r = 0; r < R; r++) dot[r * N + i] += k * q[r];
                }
            }
            const vfloat total = sums(dot);
            for (int r = 0; r < R; r++) std::memcpy(score(row + r) + s, reinterpret_cast<const float*>(&total) + r * N, N * sizeof(float));
        }
    }

    // Scales a row's scores and hides those of keys it does not see; returns the largest, or `top` if that is larger.
    float masked(int row, int keys, int seen, float top) const {
        vint lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        vfloat high = splat(top);
        for (int s = 0; s < keys; s += LANES) {
            vfloat x = load(score(row) + s) * call_.scale;
            if (s + LANES > seen) x = lane < seen - s ? x : splat(-INF);
            store(score(row) + s, x);
            high = max(x, high);
        }
        return max(high);
    }

    // A row's scores become weights; returns their sum.
    float weights(int row, int keys, float base) const {
        vfloat total{};
        for (int s = 0; s < keys; s += LANES) {
            const vfloat p = exp(load(score(row) + s) - base);
            store(score(row) + s, p);
            total += p;
        }
        return openm3::sum(total);
    }

    template <int R>
    void values(int row, int keys, const float* share, float* out) {
        constexpr int N = 4;
        int h = 0;
        for (; h + N * LANES <= call_.width; h += N * LANES) add_channels<R, N>(row, h, keys, share, out);
        for (; h < call_.width; h += LANES) add_channels<R, 1>(row, h, keys, share, out);
    }

    template <int R, int N>
    void add_channels(int row, int channel, int keys, const float* share, float* out) {
        vfloat total[R][N] = {};
        for (int s = 0; s < keys; s++) {
            ahead_.fetch(2);
            const T* value = value_ + s * call_.v.stride_b + channel;
            for (int i = 0; i < N; i++) {
                const vfloat v = load(value + i * LANES);
                for (int r = 0; r < R; r++) total[r][i] += v * splat(score(row + r)[s]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int i = 0; i < N; i++) {
                float* to = out + (row + r) * call_.width + channel + i * LANES;
                store(to, load(to) * share[row + r] + total[r][i]);
            }
    }

    const Call& call_;
    float *query_, *turned_, *score_;
    const T *key_ = nullptr, *value_ = nullptr;
    Ahead ahead_{};
    int rows_ = 0;
};

}  // namespace
}  // namespace openm3
