// Index keys and queries as int8 codes, and the largest code products of a page with some queries. For cpu.cpp beside this
// file, which says what the codes are for.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "native/amx.h"
#include "native/simd.h"

namespace openm3 {
namespace {

constexpr int TILE = 16;
constexpr int QUAD = 4;
// Query rows that tiles take at a time; a step's rows are made up to a multiple of it.
constexpr int ROWS = 16;

struct Keys {
    const void* data;
    std::int64_t stride_m, stride_b;
    int pages, block, width;

    int quads() const { return (width + QUAD - 1) / QUAD; }
    int padded() const { return (width + LANES - 1) / LANES * LANES; }
    std::int64_t code_bytes() const { return std::int64_t(block) * quads() * QUAD; }

    template <class T>
    const T* row(std::int64_t page, int slot) const {
        return static_cast<const T*>(data) + page * stride_m + slot * stride_b;
    }
};

template <class T>
void widen(const T* from, float* to, int width, int padded) {
    int j = 0;
    for (; j + LANES <= width; j += LANES) store(to + j, load(from + j));
    for (; j < width; j++) to[j] = to_float(from[j]);
    for (; j < padded; j++) to[j] = 0.0f;
}

// ---- codes

struct Scale {
    float scale, inverse;
    bool finite;
};

// What codes of values up to `largest` are multiplied with; zero where the values are too small to divide by.
Scale scale_of(const float* x, std::int64_t count) {
    vfloat largest{};
    vint good = splat(-1);
    for (std::int64_t i = 0; i < count; i += LANES) {
        const vfloat v = load(x + i);
        good &= v * 0.0f == splat(0.0f);
        largest = max(largest, max(v, -v));
    }
    const float top = max(largest);
    const bool finite = bits(good) == (1u << LANES) - 1;
    return {top < 1e-30f ? 0.0f : top / 127.0f, top < 1e-30f ? 0.0f : 127.0f / top, finite};
}

typedef std::int8_t vbyte __attribute__((vector_size(LANES)));

// Codes of one row, its length and that of what the codes lose, both rounded up.
struct Norms {
    float value, coded, rest;
};

Norms encode_row(const float* x, int padded, Scale s, std::int8_t* code) {
    vfloat value{}, coded{}, rest{};
    for (int j = 0; j < padded; j += LANES) {
        const vfloat v = load(x + j);
        const vfloat whole = (v * s.inverse + 12582912.0f) - 12582912.0f;
        const vbyte bytes = __builtin_convertvector(__builtin_convertvector(whole, vint), vbyte);
        std::memcpy(code + j, &bytes, sizeof bytes);
        const vfloat back = whole * s.scale, lost = v - back;
        value += v * v, coded += back * back, rest += lost * lost;
    }
    const float up = 1.0f + 1e-5f, floor = 1e-18f;
    return {std::sqrt(sum(value)) * up + floor, std::sqrt(sum(coded)) * up, std::sqrt(sum(rest)) * up + floor};
}

// Puts the codes of a page's key where they belong.
inline void place_row(const std::int8_t* row, int slot, int quads, std::uint8_t* code) {
    std::uint8_t* tile = code + std::int64_t(slot / TILE) * quads * TILE * QUAD + slot % TILE * QUAD;
    for (int q = 0; q < quads; q++) {
        std::uint32_t four;
        std::memcpy(&four, row + q * QUAD, 4);
        four ^= 0x80808080u;
        std::memcpy(tile + std::int64_t(q) * TILE * QUAD, &four, 4);
    }
}

// bound[0..2]: the codes' scale, the largest |rest| and the largest |scale * code| of the page's keys.
template <class T>
void encode_page(const Keys& keys, std::int64_t page, std::uint8_t* code, float* bound) {
    const int padded = keys.padded(), quads = keys.quads();
    std::vector<float> wide(std::size_t(keys.block) * padded);
    std::vector<std::int8_t> row(padded + QUAD);
    for (int b = 0; b < keys.block; b++)
        widen(keys.row<T>(page, b), wide.data() + std::size_t(b) * padded, keys.width, padded);
    const Scale s = scale_of(wide.data(), std::int64_t(keys.block) * padded);
    bound[0] = s.scale, bound[1] = s.finite ? 0.0f : INF, bound[2] = 0.0f;
    if (!s.finite) {
        std::memset(code, 128, keys.code_bytes());
        return;
    }
    for (int b = 0; b < keys.block; b++) {
        const Norms n = encode_row(wide.data() + std::size_t(b) * padded, padded, s, row.data());
        bound[1] = std::max(bound[1], n.rest), bound[2] = std::max(bound[2], n.coded);
        place_row(row.data(), b, quads, code);
    }
}

// The page's codes stand for its keys but this one, which has changed: encodes it alone, at their scale. Returns false,
// and changes nothing, where that is too small for it. What its former values did to the bounds remains.
template <class T>
bool encode_key(const Keys& keys, std::int64_t page, int slot, std::uint8_t* code, float* bound) {
    const int padded = keys.padded(), quads = keys.quads();
    thread_local std::vector<float> wide;
    thread_local std::vector<std::int8_t> row;
    wide.resize(padded), row.resize(padded + QUAD);
    widen(keys.row<T>(page, slot), wide.data(), keys.width, padded);
    const Scale s = scale_of(wide.data(), padded);
    if (!s.finite || !(s.scale <= bound[0]) || bound[0] == 0.0f || !(bound[1] < INF)) return false;
    const Norms n = encode_row(wide.data(), padded, {bound[0], 1.0f / bound[0], true}, row.data());
    bound[1] = std::max(bound[1], n.rest), bound[2] = std::max(bound[2], n.coded);
    place_row(row.data(), slot, quads, code);
    return true;
}

// ---- products of codes

constexpr std::int32_t LEAST = std::numeric_limits<std::int32_t>::min();

// A scan reads so many pages in turns: the processor fetches ahead within each, and a page alone is over too soon for that
// to reach the memory's rate.
#if defined(__AVX512VNNI__)
constexpr int WORDS = 1;
constexpr int MAX_QUERIES = 6, PAGES = 4;
#elif defined(__AVX512BW__)
constexpr int WORDS = 2;
constexpr int MAX_QUERIES = 4, PAGES = 4;
#else
constexpr int WORDS = 2;
constexpr int MAX_QUERIES = 4, PAGES = 2;
#endif

// Four signed codes of a query as the product below wants them.
void pack_quad(const std::int8_t* q, std::int32_t* word) {
    if constexpr (WORDS == 1) {
        std::memcpy(word, q, 4);
    } else {
        word[0] = std::int32_t(std::uint16_t(q[0])) | std::int32_t(q[2]) * 65536;
        word[1] = std::int32_t(std::uint16_t(q[1])) | std::int32_t(q[3]) * 65536;
    }
}

// total += the products of four unsigned codes of each of LANES keys with four signed ones of a query.
inline vint add_quad(vint total, const std::uint8_t* key, const std::int32_t* word) {
#if defined(__AVX512VNNI__)
    return (vint)_mm512_dpbusd_epi32((__m512i)total, _mm512_loadu_si512(key), _mm512_set1_epi32(word[0]));
#elif defined(__AVX512BW__)
    const __m512i k = _mm512_loadu_si512(key);
    const __m512i even = _mm512_and_si512(k, _mm512_set1_epi32(0x00ff00ff)), odd = _mm512_srli_epi16(k, 8);
    return total + (vint)_mm512_madd_epi16(even, _mm512_set1_epi32(word[0])) +
           (vint)_mm512_madd_epi16(odd, _mm512_set1_epi32(word[1]));
#elif defined(__AVX2__)
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key));
    const __m256i even = _mm256_and_si256(k, _mm256_set1_epi32(0x00ff00ff)), odd = _mm256_srli_epi16(k, 8);
    return total + (vint)_mm256_madd_epi16(even, _mm256_set1_epi32(word[0])) +
           (vint)_mm256_madd_epi16(odd, _mm256_set1_epi32(word[1]));
#else
    vint k;
    std::memcpy(&k, key, sizeof k);
    const std::int32_t q0 = std::int16_t(word[0]), q1 = std::int16_t(word[1]), q2 = word[0] >> 16, q3 = word[1] >> 16;
    return total + (k & 255) * q0 + ((k >> 8) & 255) * q1 + ((k >> 16) & 255) * q2 + ((k >> 24) & 255) * q3;
#endif
}

// Where vector v (LANES keys) of a page stands; from quad to quad it is TILE * QUAD bytes on.
inline const std::uint8_t* vector_of(const std::uint8_t* code, int v, int quads) {
    const int key = v * LANES;
    return code + std::int64_t(key / TILE) * quads * TILE * QUAD + key % TILE * QUAD;
}

template <int Q, int V>
inline void products(const std::uint8_t* const (&key)[V], const std::int32_t* query, int quads, vint (&total)[Q][V]) {
    for (int q = 0; q < Q; q++)
        for (int v = 0; v < V; v++) total[q][v] = vint{};
    for (int j = 0; j < quads; j++)
        for (int q = 0; q < Q; q++)
            for (int v = 0; v < V; v++)
                total[q][v] = add_quad(total[q][v], key[v] + j * TILE * QUAD, query + (q * quads + j) * WORDS);
}

// best[p][q]: the largest code product of query q with the keys of page p.
template <int Q>
void page_maxima(int vectors, int quads, const std::uint8_t* const* code, const std::int32_t* query, std::int32_t (*best)[ROWS]) {
    vint top[Q][PAGES];
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < PAGES; p++) top[q][p] = splat(LEAST);
    for (int v = 0; v < vectors; v++) {
        const std::uint8_t* key[PAGES];
        for (int p = 0; p < PAGES; p++) key[p] = vector_of(code[p], v, quads);
        vint total[Q][PAGES];
        products<Q, PAGES>(key, query, quads, total);
        for (int q = 0; q < Q; q++)
            for (int p = 0; p < PAGES; p++) top[q][p] = max(top[q][p], total[q][p]);
    }
    for (int q = 0; q < Q; q++)
        for (int p = 0; p < PAGES; p++) best[p][q] = max(top[q][p]);
}

using PageMaxima = void (*)(int, int, const std::uint8_t* const*, const std::int32_t*, std::int32_t (*)[ROWS]);
template <int... Q>
constexpr std::array<PageMaxima, sizeof...(Q)> maxima_table(std::integer_sequence<int, Q...>) {
    return {page_maxima<Q + 1>...};
}
constexpr auto MAXIMA = maxima_table(std::make_integer_sequence<int, MAX_QUERIES>{});

#if defined(__AMX_INT8__)
static_assert(PAGES == 4 && TILE == TILE_ROWS && ROWS == TILE_ROWS && LANES == TILE_ROWS);

// Lane i of the result: the largest of row i. Pairs of rows are folded into one, each in half as many lanes as before.
template <int WIDTH = LANES / 2>
vint maxima(vint* row) {
    if constexpr (WIDTH == 0) {
        return row[0];
    } else {
        alignas(64) static constexpr auto LOW = [] {
            std::array<std::int32_t, LANES> lane{};
            for (int i = 0; i < LANES; i++) lane[i] = i / (2 * WIDTH) * (2 * WIDTH) + i % WIDTH + (i & WIDTH ? LANES : 0);
            return lane;
        }();
        const __m512i low = _mm512_load_si512(LOW.data()), high = _mm512_add_epi32(low, _mm512_set1_epi32(WIDTH));
        for (int i = 0; i < WIDTH; i++) {
            const __m512i a = (__m512i)row[i], b = (__m512i)row[i + WIDTH];
            row[i] = (vint)_mm512_max_epi32(_mm512_permutex2var_epi32(a, low, b), _mm512_permutex2var_epi32(a, high, b));
        }
        return maxima<WIDTH / 2>(row);
    }
}

// product[n][query][key]: code products of 16 queries with four tiles of keys.
inline void tile_products(const std::uint8_t* const* key, const std::int32_t* query, int quads, vint (*product)[ROWS]) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int j = 0; j < quads; j += TILE) {
        tile_load<4>(query + j, quads * QUAD);
        tile_load<5>(key[0] + j * TILE * QUAD, TILE * QUAD);
        tile_product_bytes<0, 4, 5>();
        tile_load<6>(key[1] + j * TILE * QUAD, TILE * QUAD);
        tile_product_bytes<1, 4, 6>();
        tile_load<7>(key[2] + j * TILE * QUAD, TILE * QUAD);
        tile_product_bytes<2, 4, 7>();
        tile_load<5>(key[3] + j * TILE * QUAD, TILE * QUAD);
        tile_product_bytes<3, 4, 5>();
    }
    tile_store<0>(product[0], TILE * QUAD);
    tile_store<1>(product[1], TILE * QUAD);
    tile_store<2>(product[2], TILE * QUAD);
    tile_store<3>(product[3], TILE * QUAD);
}

// As page_maxima, of 16 queries; of N pages, four of whose tiles are multiplied together, from one or from each.
template <int N>
void tile_maxima(int tiles, int quads, const std::uint8_t* const* code, const std::int32_t* query, std::int32_t (*best)[ROWS]) {
    constexpr int EACH = PAGES / N;
    vint product[PAGES][ROWS], top[N][ROWS];
    for (auto& page : top)
        for (vint& row : page) row = splat(LEAST);
    for (int t = 0; t < tiles; t += EACH) {
        const std::uint8_t* key[PAGES];
        for (int i = 0; i < PAGES; i++) key[i] = code[i / EACH] + std::int64_t(t + i % EACH) * quads * TILE * QUAD;
        tile_products(key, query, quads, product);
        for (int i = 0; i < PAGES; i++)
            for (int q = 0; q < ROWS; q++) top[i / EACH][q] = max(top[i / EACH][q], product[i][q]);
    }
    for (int p = 0; p < N; p++) {
        const vint largest = maxima(top[p]);
        std::memcpy(best[p], &largest, sizeof largest);
    }
}
#endif

}  // namespace
}  // namespace openm3
