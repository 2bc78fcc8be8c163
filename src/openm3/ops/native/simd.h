// Vectors of the instruction set this file is compiled for, on the compiler's own vector types.
//
// The whole module is compiled once for each level (portable, AVX2, AVX-512, AVX-512 with VNNI and BF16), so kernels say
// what they compute once and only this header knows what a level has.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace openm3 {

#if defined(__AVX512F__)
inline constexpr int LANES = 16;
inline constexpr int REGISTERS = 32;
#elif defined(__AVX2__)
inline constexpr int LANES = 8;
inline constexpr int REGISTERS = 16;
#else
inline constexpr int LANES = 4;
inline constexpr int REGISTERS = 16;
#endif

typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef std::int32_t vint __attribute__((vector_size(LANES * 4)));
typedef std::uint32_t vuint __attribute__((vector_size(LANES * 4)));

inline constexpr float INF = std::numeric_limits<float>::infinity();

struct bfloat16 {
    std::uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return std::bit_cast<float>(std::uint32_t(x.bits) << 16); }

inline bfloat16 to_bfloat16(float x) {
    auto bits = std::bit_cast<std::uint32_t>(x);
    if (x != x) return {std::uint16_t((bits >> 16) | 0x40)};
    return {std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
inline T from_float(float x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else return to_bfloat16(x);
}

// x - 0 is x even for -0, which x + 0 is not: compilers see a plain broadcast here and an addition there.
inline vfloat splat(float x) { return x - vfloat{}; }
inline vint splat(std::int32_t x) { return vint{} + x; }

inline vfloat load(const float* p) {
    vfloat x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline vint load(const std::int32_t* p) {
    vint x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline vfloat load(const bfloat16* p) {
#if defined(__AVX512F__)
    auto half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    auto half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
    vint x;
    for (int i = 0; i < LANES; i++) x[i] = std::int32_t(std::uint32_t(p[i].bits) << 16);
    return (vfloat)x;
#endif
}

inline void store(float* p, vfloat x) { std::memcpy(p, &x, sizeof x); }

inline void store(bfloat16* p, vfloat x) {
#if defined(__AVX512F__)
    const vint bits = (vint)x, rounded = bits + 0x7fff + ((bits >> 16) & 1), right = x == x ? rounded : bits | 0x400000;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)right, 16)));
#else
    for (int i = 0; i < LANES; i++) p[i] = to_bfloat16(x[i]);
#endif
}

inline vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
inline vint max(vint a, vint b) { return a > b ? a : b; }

inline float sum(vfloat x) {
    float total[LANES];
    store(total, x);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) total[i] += total[i + width];
    return total[0];
}

inline std::int32_t max(vint x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    std::int32_t best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
#endif
}

inline float max(vfloat x) {
    float best = x[0];
    for (int i = 1; i < LANES; i++) best = x[i] > best ? x[i] : best;
    return best;
}

// Bit i of the result: lane i of a comparison is true.
inline unsigned bits(vint mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return unsigned(_mm256_movemask_ps((__m256)mask));
#else
    unsigned found = 0;
    for (int i = 0; i < LANES; i++) found |= unsigned(mask[i] & 1) << i;
    return found;
#endif
}

template <class Pick, class V, std::size_t... I>
inline V pick(V a, V b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, Pick::lane(int(I))...);
}

// Lanes of a (0..LANES) and b (LANES..2 LANES), those that Pick::lane names.
template <class Pick, class V>
inline V pick(V a, V b) {
    return pick<Pick>(a, b, std::make_index_sequence<LANES>{});
}

#if defined(__AVX512F__)
// x[i][n] and x[n][i] change places.
template <class V>
inline void transpose(V (&x)[LANES]) {
    // Pairs, then fours, then quarters of a register, each twice as far apart as before.
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            b[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + k + 2]);
            b[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + k + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            a[i + k] = _mm512_shuffle_i32x4(b[i + k], b[i + k + 4], 0x88);
            a[i + k + 4] = _mm512_shuffle_i32x4(b[i + k], b[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        x[k] = (V)_mm512_shuffle_i32x4(a[k], a[k + 8], 0x88);
        x[k + 8] = (V)_mm512_shuffle_i32x4(a[k], a[k + 8], 0xdd);
    }
}
#else
// What row i of a transposition takes from itself and from row i + S (or, High, what row i + S takes).
template <int S, bool High>
struct Swap {
    static constexpr int lane(int i) { return High ? (i & S ? LANES + i : i + S) : (i & S ? LANES + i - S : i); }
};

// x[i][n] and x[n][i] change places: squares of S first, then those within.
template <int S = LANES / 2, class V>
inline void transpose(V (&x)[LANES]) {
    if constexpr (S > 0) {
        for (int i = 0; i < LANES; i++) {
            if (i & S) continue;
            const V a = x[i], b = x[i + S];
            x[i] = pick<Swap<S, false>>(a, b);
            x[i + S] = pick<Swap<S, true>>(a, b);
        }
        transpose<S / 2>(x);
    }
}
#endif

// What row i of a sum takes from itself and from row i + S, so that lane n of the two together is of row i or i + S: its
// own lanes, or (Other) those that they are to be added to.
template <int S, bool Other>
struct Fold {
    static constexpr int lane(int i) { return (i & S ? LANES : 0) + (Other ? i ^ S : i); }
};

// Lane i: the sum of x[i]'s lanes. Overwrites x.
template <int S = LANES / 2>
inline vfloat sums(vfloat (&x)[LANES]) {
    if constexpr (S == 0) {
        return x[0];
    } else {
        for (int i = 0; i < S; i++) {
            const vfloat a = x[i], b = x[i + S];
            x[i] = pick<Fold<S, false>>(a, b) + pick<Fold<S, true>>(a, b);
        }
        return sums<S / 2>(x);
    }
}

// e^x within 1.01 ulp for x in [-87.3, 88]; 0 below, infinity above, NaN for NaN.
inline vfloat exp(vfloat x) {
#if defined(__AVX512F__)
    const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), _MM_FROUND_TO_NEAREST_INT);
#else
    // Adding 1.5 * 2^23 rounds to whole numbers.
    const vfloat n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
#endif
    const vfloat r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vfloat p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
    const auto inside = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.3f), _CMP_NLT_UQ);
    const auto large = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(88.0f), _CMP_GT_OQ);
    return (vfloat)_mm512_mask_mov_ps(_mm512_maskz_scalef_ps(inside, (__m512)p, (__m512)n), large, (__m512)splat(INF));
#else
    // Unsigned: outside the range, where the sum means nothing and is not taken, it may overflow.
    const vfloat y = (vfloat)((vuint)p + ((vuint)__builtin_convertvector(n, vint) << 23));
    const vfloat low = x < -87.3f ? splat(0.0f) : y;
    const vfloat both = x > 88.0f ? splat(INF) : low;
    return x == x ? both : x;
#endif
}

}  // namespace openm3
