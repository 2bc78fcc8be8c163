// Matrix tiles (Intel AMX): 16 rows of 64 bytes each, multiplied at some sixteen times the rate of fused multiply-add.
//
// A tile product is  c[m][n] += sum over i and j of a[m][i * G + j] * b[i][n * G + j],  with G = 2 for bfloat16 and 4 for
// bytes: a is rows as they lie in memory, b holds G neighbouring numbers of the inner axis together.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AMX_TILE__)
#include <immintrin.h>

#include <cstdint>
#endif

namespace openm3 {

// Whether the processor has tiles and the system lets this process use them, which has to be asked for once. Compilers
// disagree about the names of these features, so the processor itself is asked.
inline bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, ALL = BF16 | TILE | INT8;
    static const bool granted = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & ALL) == ALL && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return granted;
#else
    return false;
#endif
}

#if defined(__AMX_TILE__)

inline constexpr int TILE_ROWS = 16, TILE_ROW_BYTES = 64;

// All eight tiles of this thread at full size, for as long as it lives.
class Tiles {
public:
    Tiles() {
        Shape shape;
        for (int i = 0; i < 8; i++) shape.row_bytes[i] = TILE_ROW_BYTES, shape.rows[i] = TILE_ROWS;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;

private:
    struct alignas(64) Shape {
        std::uint8_t palette = 1, start = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {};
        std::uint8_t rows[16] = {};
    };
};

// The instructions, with what compilers' own macros lack: tile numbers as constants, and order against other memory accesses.
template <int Tile>
inline void tile_load(const void* rows, std::int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(Tile) : "memory");
}

template <int Tile>
inline void tile_store(void* rows, std::int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(row_bytes), "i"(Tile) : "memory");
}

template <int Tile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// C += A B, of bfloat16 numbers in float32.
template <int C, int A, int B>
inline void tile_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// C += A B, of signed and unsigned bytes in 32-bit integers.
template <int C, int A, int B>
inline void tile_product_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace openm3
