// Certified block selection: scan int8 codes of the index keys, rescore exactly the few keys that could matter.
//
// A page's keys are k = scale * code + rest. For a query q = scale_q * code_q + rest_q, coded alike,
//
//     | q . k  -  scale_q scale (code_q . code) |  <=  |q| max|rest|  +  |rest_q| max|scale code|
//
// by Cauchy and Schwarz, so the scan brackets every block's score. The K-th largest lower end bounds the K-th best score
// from below; only blocks whose upper end reaches it are looked at again, and of these only the keys whose own bracket
// does, in float32 from the stored values. What is selected is the total order of the contract, whatever the codes lost.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "native/simd.h"
#include "native/tensors.h"

namespace openm3 {
namespace {

constexpr int TILE = 16;
constexpr int QUAD = 4;
// Estimates held at a time, as floats: a step's scores never exist at length.
constexpr std::int64_t ESTIMATES_AT_ONCE = 1 << 22;
constexpr int PAGES_AT_ONCE = 16;
// From here on it pays to encode keys that came without codes.
constexpr int QUERIES_TO_ENCODE = 8;

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

template <class T>
float exact_dot(const float* query, const T* key, int width) {
    vfloat a{}, b{};
    int j = 0;
    for (; j + 2 * LANES <= width; j += 2 * LANES) {
        a += load(query + j) * load(key + j);
        b += load(query + j + LANES) * load(key + j + LANES);
    }
    for (; j + LANES <= width; j += LANES) a += load(query + j) * load(key + j);
    float total = sum(a + b);
    for (; j < width; j++) total += query[j] * to_float(key[j]);
    return total == total ? total : -INF;
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
        std::uint8_t* tile = code + std::int64_t(b / TILE) * quads * TILE * QUAD + b % TILE * QUAD;
        for (int q = 0; q < quads; q++) {
            std::uint32_t four;
            std::memcpy(&four, row.data() + q * QUAD, 4);
            four ^= 0x80808080u;
            std::memcpy(tile + std::int64_t(q) * TILE * QUAD, &four, 4);
        }
    }
}

// ---- products of codes

#if defined(__AVX512VNNI__)
constexpr int WORDS = 1;
constexpr int MAX_QUERIES = 6, VECTORS = 4;
#elif defined(__AVX512BW__)
constexpr int WORDS = 2;
constexpr int MAX_QUERIES = 4, VECTORS = 4;
#else
constexpr int WORDS = 2;
constexpr int MAX_QUERIES = 4, VECTORS = 2;
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

// The largest code product of each of Q queries with the keys of a page.
template <int Q>
void page_maxima(const std::uint8_t* code, int vectors, const std::int32_t* query, int quads, std::int32_t* best) {
    vint top[Q];
    for (int q = 0; q < Q; q++) top[q] = splat(std::numeric_limits<std::int32_t>::min());
    int v = 0;
    for (; v + VECTORS <= vectors; v += VECTORS) {
        const std::uint8_t* key[VECTORS];
        for (int i = 0; i < VECTORS; i++) key[i] = vector_of(code, v + i, quads);
        vint total[Q][VECTORS];
        products<Q, VECTORS>(key, query, quads, total);
        for (int q = 0; q < Q; q++)
            for (int i = 0; i < VECTORS; i++) top[q] = max(top[q], total[q][i]);
    }
    for (; v < vectors; v++) {
        const std::uint8_t* key[1] = {vector_of(code, v, quads)};
        vint total[Q][1];
        products<Q, 1>(key, query, quads, total);
        for (int q = 0; q < Q; q++) top[q] = max(top[q], total[q][0]);
    }
    for (int q = 0; q < Q; q++) best[q] = max(top[q]);
}

using PageMaxima = void (*)(const std::uint8_t*, int, const std::int32_t*, int, std::int32_t*);
template <int... Q>
constexpr std::array<PageMaxima, sizeof...(Q)> maxima_table(std::integer_sequence<int, Q...>) {
    return {page_maxima<Q + 1>...};
}
constexpr auto MAXIMA = maxima_table(std::make_integer_sequence<int, MAX_QUERIES>{});

// ---- selection

// Codes and bounds of pages; place[b] is the row in both of block b of the request at hand.
struct Codes {
    const std::uint8_t* code = nullptr;
    const float* bound = nullptr;
    const std::int32_t* place = nullptr;
};

// Some tokens' queries, a row for each token and group.
struct Queries {
    int rows = 0, groups = 0, quads = 0, padded = 0;
    std::vector<float> value, scale, norm, rest;
    std::vector<std::int32_t> word, offset;
    std::vector<std::int8_t> code;

    template <class T>
    void read(const T* q, std::int64_t stride_t, std::int64_t stride_g, int tokens, const Keys& keys) {
        rows = tokens * groups, quads = keys.quads(), padded = keys.padded();
        value.resize(std::size_t(rows) * padded), scale.resize(rows), norm.resize(rows), rest.resize(rows);
        word.resize(std::size_t(rows) * quads * WORDS), offset.resize(rows), code.resize(padded + QUAD);
        for (int i = 0; i < rows; i++) {
            float* x = &value[std::size_t(i) * padded];
            widen(q + i / groups * stride_t + i % groups * stride_g, x, keys.width, padded);
            const Scale s = scale_of(x, padded);
            const Norms n = encode_row(x, padded, s, code.data());
            scale[i] = s.finite ? s.scale : 0.0f;
            norm[i] = s.finite ? n.value : INF;
            rest[i] = s.finite ? n.rest : INF;
            offset[i] = 0;
            for (int j = 0; j < quads * QUAD; j++) offset[i] += s.finite ? 128 * code[j] : (code[j] = 0);
            for (int j = 0; j < quads; j++)
                pack_quad(&code[j * QUAD], &word[(std::size_t(i) * quads + j) * WORDS]);
        }
    }
};

struct Chosen {
    float score;
    std::int32_t block;
    // The total order: larger scores first, equal ones by smaller block.
    bool operator<(const Chosen& other) const {
        return score > other.score || (score == other.score && block < other.block);
    }
};

struct Statistics {
    std::int64_t scanned = 0, rescored_blocks = 0, rescored_keys = 0;
};

// The best `room` blocks seen, worst in front.
class Best {
public:
    explicit Best(int room) : room_(room) { heap_.reserve(room + 1); }
    float threshold() const { return full() ? heap_.front().score : -INF; }
    void add(Chosen c) {
        if (full() && !(c < heap_.front())) return;
        heap_.push_back(c);
        std::push_heap(heap_.begin(), heap_.end());
        if (int(heap_.size()) > room_) {
            std::pop_heap(heap_.begin(), heap_.end());
            heap_.pop_back();
        }
    }
    const std::vector<Chosen>& blocks() const { return heap_; }

private:
    bool full() const { return int(heap_.size()) == room_; }
    int room_;
    std::vector<Chosen> heap_;
};

// The `room`-th largest of what it is given.
class Threshold {
public:
    explicit Threshold(int room) : values_(room, -INF) {}
    float value() const { return values_.front(); }
    void add(float x) {
        if (!(x > values_.front())) return;
        std::pop_heap(values_.begin(), values_.end(), std::greater<>());
        values_.back() = x;
        std::push_heap(values_.begin(), values_.end(), std::greater<>());
    }

private:
    std::vector<float> values_;
};

// Selection for the tokens of one request.
template <class T>
class Selection {
public:
    Selection(const Keys& keys, Codes codes, const std::int32_t* page, std::int64_t blocks, int num_selected, int num_local)
        : keys_(keys), codes_(codes), page_(page), num_selected_(num_selected), num_local_(num_local) {
        const std::size_t length = (blocks + LANES - 1) / LANES * LANES;
        scale_.assign(length, 0.0f), loose_.assign(length, 0.0f), norm_.assign(length, 0.0f);
        if (!codes_.code) return;
        const float slack = (keys.width + 32) * 1.2e-7f;
        for (std::int64_t b = 0; b < blocks; b++) {
            const float* bound = codes_.bound + 3 * std::int64_t(codes_.place[b]);
            scale_[b] = bound[0], norm_[b] = bound[2];
            loose_[b] = bound[1] + slack * (bound[1] + bound[2]);
        }
    }

    // out[i * stride + b]: the estimate for query row i of each block b from first to last.
    void estimate(const Queries& q, std::int64_t first, std::int64_t last, float* out, std::int64_t stride) const {
        std::int32_t best[MAX_QUERIES];
        for (std::int64_t b = first; b < last; b++) {
            if (!codes_.code) {
                for (int i = 0; i < q.rows; i++) out[i * stride + b] = exact(q, i, b);
                continue;
            }
            const std::uint8_t* code = codes_.code + codes_.place[b] * keys_.code_bytes();
            for (int i = 0; i < q.rows; i += MAX_QUERIES) {
                const int count = std::min(MAX_QUERIES, q.rows - i);
                MAXIMA[count - 1](code, keys_.block / LANES, &q.word[std::size_t(i) * q.quads * WORDS], q.quads, best);
                for (int k = 0; k < count; k++)
                    out[(i + k) * stride + b] = float(best[k] - q.offset[i + k]) * (scale_[b] * q.scale[i + k]);
            }
        }
    }

    // The selection of query row i, whose token stands in block `own`: `num_selected` ids.
    void choose(const Queries& q, int i, std::int64_t own, const float* estimate, std::int32_t* out, Statistics& stats) const {
        const std::int64_t forced = std::max<std::int64_t>(0, own - num_local_ + 1), others = forced;
        const int room = num_selected_ - int(own - forced + 1);
        std::vector<std::int32_t> chosen;
        if (others <= room) {
            for (std::int64_t b = 0; b < others; b++) chosen.push_back(std::int32_t(b));
        } else if (room > 0) {
            const Best best = codes_.code ? certified(q, i, others, room, estimate, stats) : plain(others, room, estimate);
            for (const Chosen& c : best.blocks()) chosen.push_back(c.block);
            std::sort(chosen.begin(), chosen.end());
        }
        for (std::int64_t b = forced; b <= own; b++) chosen.push_back(std::int32_t(b));
        for (int k = 0; k < num_selected_; k++) out[k] = k < int(chosen.size()) ? chosen[k] : -1;
    }

private:
    float exact(const Queries& q, int i, std::int64_t b) const {
        float best = -INF;
        for (int s = 0; s < keys_.block; s++)
            best = std::max(best, exact_dot(&q.value[std::size_t(i) * q.padded], keys_.row<T>(page_[b], s), keys_.width));
        return best;
    }

    Best plain(std::int64_t others, int room, const float* score) const {
        Best best(room);
        for (std::int64_t b = 0; b < others; b++) best.add({score[b], std::int32_t(b)});
        return best;
    }

    Best certified(const Queries& q, int i, std::int64_t others, int room, const float* estimate, Statistics& stats) const {
        const vfloat norm = splat(q.norm[i]), rest = splat(q.rest[i]);
        // Half the bracket's width; infinite where the numbers say nothing.
        const auto width_at = [&](std::int64_t b) {
            const vfloat width = norm * load(&loose_[b]) + rest * load(&norm_[b]);
            const vfloat e = load(estimate + b);
            return (width < INF) & (e * 0.0f == splat(0.0f)) ? width : splat(INF);
        };
        Threshold lower(room);
        for (std::int64_t b = 0; b < others; b += LANES) {
            const vfloat low = load(estimate + b) - width_at(b);
            unsigned found = bits(low > lower.value()) & valid(others - b);
            for (; found; found &= found - 1) lower.add(low[std::countr_zero(found)]);
        }
        struct Candidate {
            float estimate, width;
            std::int32_t block;
        };
        std::vector<Candidate> candidates;
        for (std::int64_t b = 0; b < others; b += LANES) {
            const vfloat width = width_at(b), e = load(estimate + b);
            unsigned found = ~bits(e + width < lower.value()) & valid(others - b);
            for (; found; found &= found - 1) {
                const int k = std::countr_zero(found);
                candidates.push_back({e[k], width[k], std::int32_t(b + k)});
            }
        }
        std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
            return a.estimate > b.estimate || (a.estimate == b.estimate && a.block < b.block);
        });
        Best best(room);
        for (const Candidate& c : candidates) {
            const float threshold = std::max(lower.value(), best.threshold());
            if (c.estimate + c.width < threshold) continue;
            best.add({rescore(q, i, c.block, c.width, threshold, stats), c.block});
        }
        return best;
    }

    static unsigned valid(std::int64_t left) { return left >= LANES ? (1u << LANES) - 1 : (1u << left) - 1; }

    // The exact score of a block if it reaches the threshold; some smaller number if not.
    float rescore(const Queries& q, int i, std::int64_t b, float width, float threshold, Statistics& stats) const {
        const std::uint8_t* code = codes_.code + codes_.place[b] * keys_.code_bytes();
        const float scale = scale_[b] * q.scale[i];
        float best = -INF;
        stats.rescored_blocks++;
        for (int v = 0; v < keys_.block / LANES; v++) {
            const std::uint8_t* key[1] = {vector_of(code, v, q.quads)};
            vint total[1][1];
            products<1, 1>(key, &q.word[std::size_t(i) * q.quads * WORDS], q.quads, total);
            const vfloat high = __builtin_convertvector(total[0][0] - q.offset[i], vfloat) * scale + width;
            unsigned found = ~bits(high < threshold) & ((1u << LANES) - 1);
            for (; found; found &= found - 1) {
                const int slot = v * LANES + std::countr_zero(found);
                stats.rescored_keys++;
                best = std::max(best, exact_dot(&q.value[std::size_t(i) * q.padded], keys_.row<T>(page_[b], slot), keys_.width));
            }
        }
        return best;
    }

    const Keys& keys_;
    Codes codes_;
    const std::int32_t* page_;
    int num_selected_, num_local_;
    // Of each block: the codes' scale, |rest| with slack for float32 sums, and |scale * code|.
    std::vector<float> scale_, loose_, norm_;
};

// The codes of the first blocks of one request, made for this call.
struct OwnCodes {
    std::vector<std::uint8_t> code;
    std::vector<float> bound;
    std::vector<std::int32_t> place;

    template <class T>
    Codes make(const Keys& keys, const std::int32_t* page, std::int64_t blocks, int threads) {
        code.resize(blocks * keys.code_bytes()), bound.resize(blocks * 3), place.resize(blocks);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
        for (std::int64_t b = 0; b < blocks; b++) {
            encode_page<T>(keys, page[b], &code[b * keys.code_bytes()], &bound[b * 3]);
            place[b] = std::int32_t(b);
        }
        return {code.data(), bound.data(), place.data()};
    }
};

struct Call {
    const Batch& batch;
    const Keys& keys;
    // Without codes in the pool both are null.
    const std::uint8_t* code;
    const float* bound;
    int groups, num_selected, num_local, threads;
    std::int32_t* out;
};

template <class T, class Q>
Statistics select(const Call& call, const Q* q, std::int64_t stride_t, std::int64_t stride_g) {
    const Batch& batch = call.batch;
    const Keys& keys = call.keys;
    const int groups = call.groups;
    Statistics stats;
    Queries queries;
    queries.groups = groups;
    std::vector<float> estimates;
    OwnCodes own_codes;
    for (int r = 0; r < batch.requests; r++) {
        const std::int64_t begin = batch.start[r], end = batch.start[r + 1];
        if (begin == end) continue;
        const std::int32_t* page = batch.pages(r);
        const std::int64_t last_own = batch.position(r, end - 1) / keys.block;
        // Only blocks before the last token's local ones are scored, and of these every key is there.
        const bool all = last_own < call.num_selected || call.num_local == call.num_selected;
        const std::int64_t scored = all ? 0 : std::max<std::int64_t>(0, last_own - call.num_local + 1);
        Codes codes{call.code, call.bound, page};
        if (!codes.code && scored && (end - begin) * groups >= QUERIES_TO_ENCODE)
            codes = own_codes.make<T>(keys, page, scored, call.threads);
        const Selection<T> selection(keys, codes, page, scored, call.num_selected, call.num_local);
        const std::int64_t stride = (scored + LANES - 1) / LANES * LANES;
        const std::int64_t step = std::clamp<std::int64_t>(ESTIMATES_AT_ONCE / (std::max<std::int64_t>(stride, 1) * groups), 1, 4096);
        for (std::int64_t first = begin; first < end; first += step) {
            queries.read(q + first * stride_t, stride_t, stride_g, int(std::min(step, end - first)), keys);
            estimates.resize(std::size_t(queries.rows) * stride);
            std::int64_t blocks = 0, tokens = 0;
#pragma omp parallel num_threads(call.threads) reduction(+ : blocks, tokens)
            {
#pragma omp for schedule(dynamic)
                for (std::int64_t b = 0; b < scored; b += PAGES_AT_ONCE)
                    selection.estimate(queries, b, std::min(b + PAGES_AT_ONCE, scored), estimates.data(), stride);
                Statistics mine;
#pragma omp for schedule(dynamic, 4)
                for (int i = 0; i < queries.rows; i++) {
                    const std::int64_t t = first + i / groups;
                    selection.choose(queries, i, batch.position(r, t) / keys.block, estimates.data() + i * stride,
                                     call.out + (t * groups + i % groups) * call.num_selected, mine);
                }
                blocks += mine.rescored_blocks, tokens += mine.rescored_keys;
            }
            stats.scanned += scored * queries.rows;
            stats.rescored_blocks += blocks, stats.rescored_keys += tokens;
        }
    }
    return stats;
}

// ---- Python

Keys keys_of(const Tensor& index_k) {
    expect(index_k, "index_k_MBJ", 3);
    return {index_k.data(), index_k.stride(0), index_k.stride(1), int(index_k.shape(0)), int(index_k.shape(1)), int(index_k.shape(2))};
}

void check_codes(const Keys& keys, const Tensor& code, const Tensor& bound) {
    expect_dense(code, "code_MC", 2);
    expect_dense(bound, "bound_M3", 2);
    if (std::int64_t(code.shape(0)) != keys.pages || std::int64_t(code.shape(1)) != keys.code_bytes() ||
        std::int64_t(bound.shape(0)) != keys.pages || bound.shape(1) != 3)
        throw std::invalid_argument("codes and bounds must be of the pool's pages");
}

void encode_pages(const Tensor& index_k, const Tensor& slots, const Tensor& code, const Tensor& bound, int threads) {
    const Keys keys = keys_of(index_k);
    check_codes(keys, code, bound);
    std::vector<std::int64_t> page = integers(slots, "slot_T");
    for (std::int64_t& p : page) {
        if (p < 0 || p >= std::int64_t(keys.pages) * keys.block)
            throw std::invalid_argument("slot " + std::to_string(p) + " is outside the pool");
        p /= keys.block;
    }
    std::sort(page.begin(), page.end());
    page.erase(std::unique(page.begin(), page.end()), page.end());
    auto* codes = data_of<std::uint8_t>(code, "code_MC");
    auto* bounds = data_of<float>(bound, "bound_M3");
    const bool wide = is_float32(index_k);
    if (!wide && !is_bfloat16(index_k)) throw std::invalid_argument("index keys must be float32 or bfloat16");
    const int team = page.size() > 8 ? threads : 1;
#pragma omp parallel for num_threads(team) schedule(dynamic, 4)
    for (std::size_t i = 0; i < page.size(); i++) {
        std::uint8_t* c = codes + page[i] * keys.code_bytes();
        if (wide) encode_page<float>(keys, page[i], c, bounds + 3 * page[i]);
        else encode_page<bfloat16>(keys, page[i], c, bounds + 3 * page[i]);
    }
}

nb::tuple select_blocks(const Tensor& index_q, const Tensor& index_k, std::optional<Tensor> code, std::optional<Tensor> bound,
                        const Tensor& page, const Tensor& start, const Tensor& length, int num_selected, int num_local,
                        const Tensor& out, int threads) {
    const Keys keys = keys_of(index_k);
    expect(index_q, "index_q_TGJ", 3);
    expect_dense(out, "block_TGK", 3);
    if (keys.block % TILE) throw std::invalid_argument("blocks must be a multiple of 16 tokens");
    if (std::int64_t(index_q.shape(2)) != keys.width) throw std::invalid_argument("index_q and index_k differ in width");
    if (num_local < 1 || num_local > num_selected || std::int64_t(out.shape(2)) != num_selected ||
        out.shape(0) != index_q.shape(0) || out.shape(1) != index_q.shape(1))
        throw std::invalid_argument("block_TGK must be [T, G, num_selected], and num_local from 1 to num_selected");
    if (code.has_value() != bound.has_value()) throw std::invalid_argument("codes and bounds go together");
    if (code) check_codes(keys, *code, *bound);
    const Batch batch = batch_of(page, start, length, std::int64_t(index_q.shape(0)), keys.pages, keys.block);
    const Call call{batch, keys, code ? data_of<const std::uint8_t>(*code, "code_MC") : nullptr,
                    bound ? data_of<const float>(*bound, "bound_M3") : nullptr, int(index_q.shape(1)), num_selected,
                    num_local, threads, data_of<std::int32_t>(out, "block_TGK")};
    const std::int64_t stride_t = index_q.stride(0), stride_g = index_q.stride(1);
    Statistics stats;
    const auto run = [&]<class T>(T) {
        stats = is_float32(index_q)
                    ? select<T>(call, static_cast<const float*>(index_q.data()), stride_t, stride_g)
                    : select<T>(call, data_of<const bfloat16>(index_q, "index_q_TGJ"), stride_t, stride_g);
    };
    {
        nb::gil_scoped_release released;
        if (is_float32(index_k)) run(float{});
        else if (is_bfloat16(index_k)) run(bfloat16{});
        else throw std::invalid_argument("index keys must be float32 or bfloat16");
    }
    return nb::make_tuple(stats.scanned, stats.rescored_blocks, stats.rescored_keys);
}

}  // namespace

void bind_index(nb::module_& m) {
    m.def("encode_pages", &encode_pages, nb::arg("index_k_MBJ"), nb::arg("slot_T"), nb::arg("code_MC"), nb::arg("bound_M3"),
          nb::arg("threads"), "Write codes and bounds of the pages that hold some slots.");
    m.def("select_blocks", &select_blocks, nb::arg("index_q_TGJ"), nb::arg("index_k_MBJ"), nb::arg("code_MC").none(),
          nb::arg("bound_M3").none(), nb::arg("page_RP"), nb::arg("start_R1"), nb::arg("length_R"), nb::arg("num_selected"),
          nb::arg("num_local"), nb::arg("block_TGK"), nb::arg("threads"),
          "Fill block_TGK; returns blocks scanned, blocks rescored and keys rescored.");
}

}  // namespace openm3
