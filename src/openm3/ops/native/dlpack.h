// PyTorch's tensors as kernels see them: borrowed for the length of a call, through DLPack's C exchange interface.
//
// A type that offers the interface hands out a table of functions, of which one describes a tensor without taking hold of it.
// A capsule that owns what it describes takes ten times as long, and a decode step passes hundreds of tensors.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace openm3 {

namespace nb = nanobind;

// A tensor in this machine's memory. Valid as long as the Python object that it was made of.
class Tensor {
public:
    Tensor() = default;
    explicit Tensor(const nb::dlpack::dltensor& described) : t(described) {}

    void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
    nb::dlpack::dtype dtype() const { return t.dtype; }
    std::size_t ndim() const { return std::size_t(t.ndim); }
    std::size_t shape(std::size_t i) const { return std::size_t(t.shape[i]); }
    std::int64_t stride(std::size_t i) const { return t.strides[i]; }
    std::size_t size() const {
        std::size_t product = 1;
        for (std::size_t i = 0; i < ndim(); i++) product *= shape(i);
        return product;
    }
    std::size_t nbytes() const { return size() * t.dtype.bits / 8; }

protected:
    nb::dlpack::dltensor t;
};

inline std::vector<std::int64_t> shape_of(const Tensor& x) {
    std::vector<std::int64_t> shape;
    for (std::size_t i = 0; i < x.ndim(); i++) shape.push_back(std::int64_t(x.shape(i)));
    return shape;
}

// A dense tensor in memory of its own, for what only a kernel sees.
class ScratchTensor : public Tensor {
public:
    ScratchTensor(std::vector<std::int64_t> shape, nb::dlpack::dtype type) : shape_(std::move(shape)), stride_(shape_.size()) {
        std::int64_t count = 1;
        for (std::size_t i = shape_.size(); i-- > 0; count *= shape_[i]) stride_[i] = count;
        t.device = {nb::device::cpu::value, 0};
        t.ndim = int(shape_.size());
        t.dtype = type;
        t.shape = shape_.data();
        t.strides = stride_.data();
        memory_ = std::make_unique_for_overwrite<char[]>(nbytes());
        t.data = memory_.get();
    }
    ScratchTensor(const ScratchTensor&) = delete;

private:
    std::vector<std::int64_t> shape_, stride_;
    std::unique_ptr<char[]> memory_;
};

// The part of DLPack 1.3's DLPackExchangeAPI that is used here.
struct Exchange {
    static constexpr std::uint32_t MAJOR = 1;

    std::uint32_t major, minor;
    void* previous;
    void* unused[3];
    int (*describe)(void* object, nb::dlpack::dltensor* out);
};

// What a type offers, null if nothing. The few types ever seen are kept, alive, so that their addresses stay theirs.
inline const Exchange* exchange_of(PyTypeObject* type) {
    static std::vector<std::pair<PyTypeObject*, const Exchange*>> seen;
    for (const auto& [other, exchange] : seen)
        if (other == type) return exchange;
    PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
    const Exchange* found =
        capsule ? static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api")) : nullptr;
    Py_XDECREF(capsule);
    PyErr_Clear();
    if (!found || found->major != Exchange::MAJOR || !found->describe) return nullptr;
    Py_INCREF(type);
    seen.emplace_back(type, found);
    return found;
}

// Borrows a Python object's memory; false unless it is a tensor on the CPU.
inline bool borrow(nb::handle object, Tensor& out) {
    const Exchange* exchange = exchange_of(Py_TYPE(object.ptr()));
    nb::dlpack::dltensor described;
    if (!exchange) return false;
    if (exchange->describe(object.ptr(), &described) != 0) {
        PyErr_Clear();
        return false;
    }
    out = Tensor(described);
    return described.device.device_type == nb::device::cpu::value;
}

}  // namespace openm3

template <>
struct nanobind::detail::type_caster<openm3::Tensor> {
    NB_TYPE_CASTER(openm3::Tensor, const_name("torch.Tensor"))

    bool from_python(handle src, std::uint32_t, cleanup_list*) noexcept { return openm3::borrow(src, value); }
};
