// What other operators use of the linear layers.
#pragma once

#include <optional>

#include "native/tensors.h"

namespace openm3 {

// Fills out [T, O] with x @ weight^T; the scale is that of int8 codes. Throws as its Python face.
void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const Tensor& out, int threads);

}  // namespace openm3
