// The feed-forward half of a layer with experts, in one call: the arithmetic of a few tokens takes no longer than the calls of
// its parts.
#include <nanobind/stl/optional.h>

#include <optional>

#include "experts/experts.h"
#include "linear/linear.h"
#include "native/product.h"
#include "native/simd.h"

namespace openm3 {
namespace {

// Numbers below which a second thread costs more than it saves.
constexpr std::int64_t SERIAL = 1 << 16;

// out += x * scale, rounded once.
template <class T>
void add_scaled(const Tensor& x, float scale, const Tensor& out, int threads) {
    const T* from = data_of<const T>(x, "x");
    T* to = data_of<T>(out, "out_TD");
    const std::int64_t count = out.size();
#pragma omp parallel for num_threads(threads) schedule(static) if (count >= SERIAL)
    for (std::int64_t i = 0; i < count; i += LANES)
        store_part(to + i, load_part(to + i, count - i) + scale * load_part(from + i, count - i), count - i);
}

void mixture(const Tensor& x, const Tensor& router, const Tensor& bias, std::int64_t num_active, const Tensor& gate_up,
             const std::optional<Tensor>& gate_up_scale, const Tensor& down, const std::optional<Tensor>& down_scale,
             const Tensor& shared_gate_up, const std::optional<Tensor>& shared_gate_up_scale, const Tensor& shared_down,
             const std::optional<Tensor>& shared_down_scale, float scale, float alpha, float limit, const Tensor& out,
             int threads) {
    expect(x, "x_TD", 2), expect(shared_gate_up, "shared_gate_up", 2), expect(shared_down, "shared_down", 2);
    expect(out, "out_TD", 2);
    if (num_active < 1 || num_active > std::int64_t(bias.size()) || out.shape(1) != x.shape(1))
        throw std::invalid_argument("num_active must be from 1 to the number of experts, and out_TD of x's width");
    const std::int64_t tokens = x.shape(0);
    const ScratchTensor expert({tokens, num_active}, nb::dtype<std::int32_t>()), weight({tokens, num_active}, nb::dtype<float>());
    const ScratchTensor routed(shape_of(x), x.dtype());
    route(x, router, bias, expert, weight, threads);
    experts(x, expert, weight, gate_up, gate_up_scale, down, down_scale, alpha, limit, routed, threads);
    const ScratchTensor hidden({tokens, std::int64_t(shared_gate_up.shape(0))}, x.dtype());
    const ScratchTensor active({tokens, std::int64_t(shared_down.shape(1))}, x.dtype());
    linear(x, shared_gate_up, shared_gate_up_scale, hidden, threads);
    swiglu(hidden, alpha, limit, active, threads);
    linear(active, shared_down, shared_down_scale, out, threads);
    if (is_float32(x)) add_scaled<float>(routed, scale, out, threads);
    else add_scaled<bfloat16>(routed, scale, out, threads);
}

}  // namespace

void bind_mixture(nb::module_& m) {
    m.def("mixture", &mixture, nb::arg("x_TD"), nb::arg("router_ED"), nb::arg("bias_E"), nb::arg("num_active"),
          nb::arg("gate_up_E2FD"), nb::arg("gate_up_scale").none(), nb::arg("down_EDF"), nb::arg("down_scale").none(),
          nb::arg("shared_gate_up"), nb::arg("shared_gate_up_scale").none(), nb::arg("shared_down"),
          nb::arg("shared_down_scale").none(), nb::arg("scale"), nb::arg("alpha"), nb::arg("limit"), nb::arg("out_TD"),
          nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
          "Fill out_TD with the scaled sum of each token's experts plus the shared one.");
}

}  // namespace openm3
