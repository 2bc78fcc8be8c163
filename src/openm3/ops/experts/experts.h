// What a mixture of experts is made of.
#pragma once

#include <optional>

#include "native/tensors.h"

namespace openm3 {

// Each fills its last tensors, and throws as its Python face.
void swiglu(const Tensor& gate_up, float alpha, float limit, const Tensor& out, int threads);
void route(const Tensor& x, const Tensor& router, const Tensor& bias, const Tensor& expert, const Tensor& weight, int threads);
void experts(const Tensor& x, const Tensor& expert, const Tensor& weight, const Tensor& gate_up,
             const std::optional<Tensor>& gate_up_scale, const Tensor& down, const std::optional<Tensor>& down_scale, float alpha,
             float limit, const Tensor& out, int threads);

}  // namespace openm3
