// RMS norm, and the per-head norm with partial rotation: one pass over each row, float32 inside, rounded once.
#include <cmath>
#include <vector>

#include "native/simd.h"
#include "norm/norm.h"

namespace openm3 {
namespace {

// Channels below which a second thread costs more than it saves.
constexpr std::int64_t SERIAL = 1 << 15;

// Up to three axes before the last one, as one run of rows.
struct Rows {
    std::int64_t count, inner, stride, inner_stride;

    std::int64_t at(std::int64_t row) const { return row / inner * stride + row % inner * inner_stride; }
};

Rows rows_of(const Tensor& x) {
    if (x.ndim() == 2) return {std::int64_t(x.shape(0)), 1, x.stride(0), 0};
    return {std::int64_t(x.shape(0) * x.shape(1)), std::int64_t(x.shape(1)), x.stride(0), x.stride(1)};
}

// 1 + weight.
std::vector<float> gain_of(const Tensor& weight, std::int64_t width) {
    expect_dense(weight, "weight", 1);
    if (std::int64_t(weight.shape(0)) != width)
        throw std::invalid_argument(std::to_string(weight.shape(0)) + " weights do not fit rows of " + std::to_string(width));
    std::vector<float> gain(width);
    const auto fill = [&]<class W>(const W* w) {
        for (std::int64_t i = 0; i < width; i++) gain[i] = 1.0f + to_float(w[i]);
    };
    if (is_float32(weight)) fill(data_of<const float>(weight, "weight"));
    else fill(data_of<const bfloat16>(weight, "weight"));
    return gain;
}

// One over the root mean square of a row.
template <class T>
float inverse_size(const T* x, std::int64_t width, double eps) {
    constexpr int N = 4;
    vfloat squares[N] = {};
    std::int64_t i = 0;
    for (; i + N * LANES <= width; i += N * LANES)
        for (int j = 0; j < N; j++) squares[j] += load(x + i + j * LANES) * load(x + i + j * LANES);
    for (; i + LANES <= width; i += LANES) squares[0] += load(x + i) * load(x + i);
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < width; i++) total += to_float(x[i]) * to_float(x[i]);
    return float(1.0 / std::sqrt(double(total) / double(width) + eps));
}

template <class T>
void norm_row(const T* x, const float* gain, std::int64_t width, float scale, T* out) {
    std::int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, load(x + i) * scale * load(gain + i));
    for (; i < width; i++) out[i] = from_float<T>(to_float(x[i]) * scale * gain[i]);
}

// Norms the channels x[0..half) and x[half..2 half) and turns each of the first with its partner.
template <class T>
void turn_row(const T* x, const float* gain, std::int64_t half, float scale, const float* cos, const float* sin, T* out) {
    std::int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vfloat a = load(x + i) * scale * load(gain + i);
        const vfloat b = load(x + half + i) * scale * load(gain + half + i);
        store(out + i, a * load(cos + i) - b * load(sin + i));
        store(out + half + i, b * load(cos + i) + a * load(sin + i));
    }
    for (; i < half; i++) {
        const float a = to_float(x[i]) * scale * gain[i];
        const float b = to_float(x[half + i]) * scale * gain[half + i];
        out[i] = from_float<T>(a * cos[i] - b * sin[i]);
        out[half + i] = from_float<T>(b * cos[i] + a * sin[i]);
    }
}

// Calls run(T) for the element type of x.
template <class F>
void with_type(const Tensor& x, const char* name, F run) {
    if (is_float32(x)) run(float{});
    else if (is_bfloat16(x)) run(bfloat16{});
    else throw std::invalid_argument(std::string(name) + " must be float32 or bfloat16");
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& out, int threads) {
    expect(x, "x", 2);
    expect_dense(out, "out", 2);
    const Rows rows = rows_of(x);
    const std::int64_t width = x.shape(1);
    if (out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1)) throw std::invalid_argument("x and out differ in shape");
    const std::vector<float> gain = gain_of(weight, width);
    const int team = rows.count * width < SERIAL ? 1 : threads;
    with_type(x, "x", [&]<class T>(T) {
        const T* from = data_of<const T>(x, "x");
        T* to = data_of<T>(out, "out");
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
        for (std::int64_t r = 0; r < rows.count; r++) {
            const T* row = from + rows.at(r);
            norm_row(row, gain.data(), width, inverse_size(row, width, eps), to + r * width);
        }
    });
}

}  // namespace

void norm_rotate(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps, const Tensor& out,
                 int threads) {
    const std::size_t axes = x.ndim() == 2 ? 2 : 3;
    expect(x, "x_TNH", axes);
    expect(cos, "cos_TW", 2);
    expect(sin, "sin_TW", 2);
    expect_dense(out, "out_TNH", axes);
    const Rows rows = rows_of(x);
    const std::int64_t width = x.shape(axes - 1), half = cos.shape(1);
    for (std::size_t i = 0; i < axes; i++)
        if (out.shape(i) != x.shape(i)) throw std::invalid_argument("x_TNH and out_TNH differ in shape");
    if (cos.shape(0) != x.shape(0) || sin.shape(0) != cos.shape(0) || sin.shape(1) != cos.shape(1) || 2 * half > width)
        throw std::invalid_argument("cos_TW and sin_TW must be of the tokens, and 2W at most the head's width");
    const float* cosine = data_of<const float>(cos, "cos_TW");
    const float* sine = data_of<const float>(sin, "sin_TW");
    const std::vector<float> gain = gain_of(weight, width);
    const int team = rows.count * width < SERIAL ? 1 : threads;
    with_type(x, "x_TNH", [&]<class T>(T) {
        const T* from = data_of<const T>(x, "x_TNH");
        T* to = data_of<T>(out, "out_TNH");
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
        for (std::int64_t r = 0; r < rows.count; r++) {
            const std::int64_t token = r / rows.inner;
            const T* row = from + rows.at(r);
            T* result = to + r * width;
            const float scale = inverse_size(row, width, eps);
            turn_row(row, gain.data(), half, scale, cosine + token * cos.stride(0), sine + token * sin.stride(0), result);
            norm_row(row + 2 * half, gain.data() + 2 * half, width - 2 * half, scale, result + 2 * half);
        }
    });
}

void bind_norm(nb::module_& m) {
    m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"), nb::arg("threads"),
          nb::call_guard<nb::gil_scoped_release>(), "Fill out [R, W] with the normed rows of x.");
    m.def("norm_rotate", &norm_rotate, nb::arg("x_TNH"), nb::arg("weight_H"), nb::arg("cos_TW"), nb::arg("sin_TW"),
          nb::arg("eps"), nb::arg("out_TNH"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
          "Fill out_TNH with the normed and rotated heads of x.");
}

}  // namespace openm3
