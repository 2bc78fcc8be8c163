// The native operators as a Python module, compiled once for each instruction-set level.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <string>
#include <vector>

#include "amx.h"
#include "matrix.h"
#include "simd.h"
#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace openm3 {

void bind_index(nb::module_&);
void bind_attention(nb::module_&);
void bind_linear(nb::module_&);
void bind_norm(nb::module_&);
void bind_cache(nb::module_&);
void bind_experts(nb::module_&);
void bind_mixture(nb::module_&);

// Names of the levels that this processor can run, best first.
static std::vector<std::string> levels() {
    std::vector<std::string> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (vnni && amx_granted()) found.push_back("amx");
    if (vnni) found.push_back("avx512_vnni");
    if (avx512) found.push_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
    found.push_back("portable");
    return found;
}

// Advice only: a system without huge pages, or with none left, goes on with its own.
static void prefer_huge_pages([[maybe_unused]] const Tensor& x) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t PAGE = 4096;
    const auto begin = (reinterpret_cast<std::uintptr_t>(x.data()) + PAGE - 1) / PAGE * PAGE;
    const auto end = (reinterpret_cast<std::uintptr_t>(x.data()) + x.nbytes()) / PAGE * PAGE;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// OpenMP keeps the threads that helped the caller, until it ends or says this.
static void release_threads() {
    omp_pause_resource_all(omp_pause_soft);
}

}  // namespace openm3

NB_MODULE(OPENM3_MODULE, m) {
    namespace nb = nanobind;
    m.doc() = "Native operators of openm3 for one instruction-set level.";
    m.attr("lanes") = openm3::LANES;
    m.attr("has_tiles") = !std::is_same_v<openm3::Product, openm3::Fma>;
    m.def("levels", &openm3::levels, "Names of the levels that this processor can run, best first.");
    m.def("prefer_huge_pages", &openm3::prefer_huge_pages, nb::arg("x"), "Ask for huge pages under a tensor.");
    m.def("release_threads", &openm3::release_threads, "End the threads that helped this one; more come on next use.");
    openm3::bind_index(m);
    openm3::bind_attention(m);
    openm3::bind_linear(m);
    openm3::bind_norm(m);
    openm3::bind_cache(m);
    openm3::bind_experts(m);
    openm3::bind_mixture(m);
}
