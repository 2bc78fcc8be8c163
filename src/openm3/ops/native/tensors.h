// From Python's tensors to what kernels take.
#pragma once

#include <stdexcept>
#include <string>

#include "batch.h"
#include "dlpack.h"
#include "simd.h"

namespace openm3 {

inline bool is_float32(const Tensor& x) { return x.dtype() == nb::dtype<float>(); }
inline bool is_bfloat16(const Tensor& x) {
    return x.dtype().code == std::uint8_t(nb::dlpack::dtype_code::Bfloat) && x.dtype().bits == 16;
}

// Throws std::invalid_argument unless x has this many axes and its last one is dense.
inline void expect(const Tensor& x, const char* name, std::size_t axes) {
    if (x.ndim() != axes) throw std::invalid_argument(std::string(name) + " has the wrong number of axes");
    if (x.size() && x.shape(axes - 1) > 1 && x.stride(axes - 1) != 1)
        throw std::invalid_argument(std::string(name) + " must be dense in its last axis");
}

template <class T>
T* data_of(const Tensor& x, const char* name) {
    using Bare = std::remove_const_t<T>;
    bool right;
    if constexpr (std::is_same_v<Bare, bfloat16>) right = is_bfloat16(x);
    else right = x.dtype() == nb::dtype<Bare>();
    if (!right) throw std::invalid_argument(std::string(name) + " has the wrong dtype");
    return static_cast<T*>(x.data());
}

// Throws std::invalid_argument unless x is one dense piece of memory.
inline void expect_dense(const Tensor& x, const char* name, std::size_t axes) {
    expect(x, name, axes);
    if (x.size() == 0) return;
    std::int64_t stride = 1;
    for (std::size_t i = axes; i-- > 0;) {
        if (x.shape(i) > 1 && x.stride(i) != stride)
            throw std::invalid_argument(std::string(name) + " must be contiguous");
        stride *= std::int64_t(x.shape(i));
    }
}

template <class T>
std::int64_t element(const Tensor& x, std::size_t i) {
    return static_cast<const T*>(x.data())[std::int64_t(i) * x.stride(0)];
}

inline std::vector<std::int64_t> integers(const Tensor& x, const char* name) {
    if (x.ndim() != 1) throw std::invalid_argument(std::string(name) + " must have one axis");
    std::vector<std::int64_t> values(x.shape(0));
    for (std::size_t i = 0; i < values.size(); i++) {
        if (x.dtype() == nb::dtype<std::int32_t>()) values[i] = element<std::int32_t>(x, i);
        else if (x.dtype() == nb::dtype<std::int64_t>()) values[i] = element<std::int64_t>(x, i);
        else throw std::invalid_argument(std::string(name) + " must hold 32- or 64-bit integers");
    }
    return values;
}

// The batch of an operator's call, checked against its tokens and its pool.
inline Batch batch_of(const Tensor& page, const Tensor& start, const Tensor& length, std::int64_t num_tokens,
                      std::int64_t num_pages, int block_size) {
    expect_dense(page, "page_RP", 2);
    Batch batch{int(page.shape(0)), int(page.shape(1)), data_of<const std::int32_t>(page, "page_RP"),
                integers(start, "start_R1"), integers(length, "length_R")};
    if (batch.start.size() != batch.length.size() + 1 || int(batch.length.size()) != batch.requests)
        throw std::invalid_argument("page_RP, start_R1 and length_R must be of the same requests");
    batch.check(num_tokens, num_pages, block_size);
    return batch;
}

}  // namespace openm3
