// What other operators use of the norms.
#pragma once

#include "native/tensors.h"

namespace openm3 {

// Fills out with the normed and rotated heads of x: [T, N, H], or [T, H] where there is one head. Throws as its Python face.
void norm_rotate(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps, const Tensor& out,
                 int threads);

}  // namespace openm3
