// Page writes: the rows of a step's tokens to their slots, converted to the pool's dtype on the way; and the same with the
// norm and the rotation that come before.
#include <algorithm>
#include <optional>
#include <vector>

#include <nanobind/stl/optional.h>

#include "native/simd.h"
#include "norm/norm.h"

namespace openm3 {
namespace {

// Numbers below which a second thread costs more than it saves.
constexpr std::int64_t SERIAL = 1 << 17;

template <class From, class To>
void copy_row(const From* from, To* to, std::int64_t width) {
    if constexpr (std::is_same_v<From, To>) {
        std::memcpy(to, from, width * sizeof(To));
    } else {
        std::int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(to + i, load(from + i));
        for (; i < width; i++) to[i] = from_float<To>(to_float(from[i]));
    }
}

// New rows [T, G, W] and the pool [M, G, B, W] they go to; index keys have one group.
struct Write {
    const Tensor& rows;
    const Tensor& pool;
    std::int64_t groups, width, from_token, from_group, to_page, to_group, to_slot;
    bool from_float32, to_float32;

    template <class From, class To>
    void copy(std::int64_t token, std::int64_t page, std::int64_t offset) const {
        const From* from = static_cast<const From*>(rows.data()) + token * from_token;
        To* to = static_cast<To*>(pool.data()) + page * to_page + offset * to_slot;
        for (std::int64_t g = 0; g < groups; g++) copy_row(from + g * from_group, to + g * to_group, width);
    }

    void token(std::int64_t token, std::int64_t page, std::int64_t offset) const {
        if (from_float32 && to_float32) copy<float, float>(token, page, offset);
        else if (from_float32) copy<float, bfloat16>(token, page, offset);
        else if (to_float32) copy<bfloat16, float>(token, page, offset);
        else copy<bfloat16, bfloat16>(token, page, offset);
    }
};

Write write_of(const Tensor& rows, const Tensor& pool, const char* name, bool grouped) {
    expect(rows, name, grouped ? 3 : 2);
    expect(pool, name, grouped ? 4 : 3);
    const std::size_t last = rows.ndim() - 1, slot = pool.ndim() - 2;
    if (rows.shape(last) != pool.shape(slot + 1) || (grouped && rows.shape(1) != pool.shape(1)))
        throw std::invalid_argument(std::string(name) + ": the new rows do not fit the pool");
    for (const Tensor* x : {&rows, &pool})
        if (!is_float32(*x) && !is_bfloat16(*x)) throw std::invalid_argument(std::string(name) + " must be float32 or bfloat16");
    return {rows, pool, grouped ? std::int64_t(rows.shape(1)) : 1, std::int64_t(rows.shape(last)), rows.stride(0),
            grouped ? rows.stride(1) : 0, pool.stride(0), grouped ? pool.stride(1) : 0, pool.stride(slot),
            is_float32(rows), is_float32(pool)};
}

void write_pages(const Tensor& k, const Tensor& v, const std::optional<Tensor>& index_k, const Tensor& k_pool, const Tensor& v_pool,
                 const std::optional<Tensor>& index_k_pool, const Tensor& slot, int threads) {
    if (index_k.has_value() != index_k_pool.has_value())
        throw std::invalid_argument("index keys and the pool's index part must be given together or not at all");
    std::vector<Write> writes{write_of(k, k_pool, "k", true), write_of(v, v_pool, "v", true)};
    if (index_k) writes.push_back(write_of(*index_k, *index_k_pool, "index_k", false));
    const std::int64_t pages = k_pool.shape(0), block = k_pool.shape(2);
    const std::vector<std::int64_t> slots = integers(slot, "slot_T");
    std::int64_t numbers = 0;
    for (const Write& write : writes) {
        const Tensor& pool = write.pool;
        if (write.rows.shape(0) != slots.size()) throw std::invalid_argument("every token needs one slot");
        if (std::int64_t(pool.shape(0)) != pages || std::int64_t(pool.shape(pool.ndim() - 2)) != block)
            throw std::invalid_argument("the parts of a pool must have the same pages");
        numbers += std::int64_t(slots.size()) * write.groups * write.width;
    }
    for (std::int64_t s : slots)
        if (s < 0 || s >= pages * block)
            throw std::invalid_argument("slot " + std::to_string(s) + " is outside the pool of " + std::to_string(pages) +
                                        " pages of " + std::to_string(block) + " tokens");
    const int team = numbers < SERIAL ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (std::size_t t = 0; t < slots.size(); t++)
        for (const Write& write : writes) write.token(t, slots[t] / block, slots[t] % block);
}

void write_heads(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& index_q,
                 const std::optional<Tensor>& index_k, const Tensor& q_weight, const Tensor& k_weight,
                 const std::optional<Tensor>& index_q_weight, const std::optional<Tensor>& index_k_weight, const Tensor& cos,
                 const Tensor& sin, double eps, const Tensor& k_pool, const Tensor& v_pool,
                 const std::optional<Tensor>& index_k_pool, const Tensor& slot, const Tensor& q_out,
                 const std::optional<Tensor>& index_q_out, int threads) {
    const bool sparse = index_q.has_value();
    for (const auto* part : {&index_k, &index_q_weight, &index_k_weight, &index_k_pool, &index_q_out})
        if (part->has_value() != sparse)
            throw std::invalid_argument("the parts of the index branch must be given together or not at all");
    norm_rotate(q, q_weight, cos, sin, eps, q_out, threads);
    const ScratchTensor turned_k(shape_of(k), k.dtype());
    norm_rotate(k, k_weight, cos, sin, eps, turned_k, threads);
    if (!sparse) return write_pages(turned_k, v, {}, k_pool, v_pool, {}, slot, threads);
    norm_rotate(*index_q, *index_q_weight, cos, sin, eps, *index_q_out, threads);
    const ScratchTensor turned_index_k(shape_of(*index_k), index_k->dtype());
    norm_rotate(*index_k, *index_k_weight, cos, sin, eps, turned_index_k, threads);
    write_pages(turned_k, v, turned_index_k, k_pool, v_pool, index_k_pool, slot, threads);
}

}  // namespace

void bind_cache(nb::module_& m) {
    m.def("write_pages", &write_pages, nb::arg("k_TGH"), nb::arg("v_TGH"), nb::arg("index_k_TJ").none(), nb::arg("k_MGBH"),
          nb::arg("v_MGBH"), nb::arg("index_k_MBJ").none(), nb::arg("slot_T"), nb::arg("threads"),
          nb::call_guard<nb::gil_scoped_release>(), "Copy each token's rows to its slot of the pool.");
    m.def("write_heads", &write_heads, nb::arg("q_TNH"), nb::arg("k_TGH"), nb::arg("v_TGH"), nb::arg("index_q_TGJ").none(),
          nb::arg("index_k_TJ").none(), nb::arg("q_weight"), nb::arg("k_weight"), nb::arg("index_q_weight").none(),
          nb::arg("index_k_weight").none(), nb::arg("cos_TW"), nb::arg("sin_TW"), nb::arg("eps"), nb::arg("k_MGBH"),
          nb::arg("v_MGBH"), nb::arg("index_k_MBJ").none(), nb::arg("slot_T"), nb::arg("q_out"),
          nb::arg("index_q_out").none(), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(),
          "Norm and turn the heads: queries to q_out and index_q_out, keys and values to their slots.");
}

}  // namespace openm3
