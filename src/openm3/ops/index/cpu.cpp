// Certified block selection: scan int8 codes of the index keys, rescore exactly the few keys that could matter.
//
// A page's keys are k = scale * code + rest. For a query q = scale_q * code_q + rest_q, coded alike,
//
//     | q . k  -  scale_q scale (code_q . code) |  <=  |q| max|rest|  +  |rest_q| max|scale code|
//
// by Cauchy and Schwarz, so the scan brackets every block's score. The K-th largest lower end bounds the K-th best score
// from below; only blocks whose upper end reaches it are looked at again, and of these only the keys whose own bracket
// does, in float32 from the stored values. What is selected is the total order of the contract, whatever the codes lost.
//
// Each of the three goes block by block for many query rows together: numbers of a block stand side by side for all rows.
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <utility>
#include <vector>

#include "index/codes.h"
#include "native/simd.h"
#include "native/tensors.h"

namespace openm3 {
namespace {

// Estimates held at a time, as floats: a step's scores never exist at length.
constexpr std::int64_t ESTIMATES_AT_ONCE = 1 << 22;
constexpr int PAGES_AT_ONCE = 16;
// From here on it pays to encode keys that came without codes.
constexpr int QUERIES_TO_ENCODE = 8;
// So few scores of a request are computed by one thread, if there are other requests for the others: for 130 two threads
// that meet four times take as long as one.
constexpr std::int64_t SCORES_ON_ONE_THREAD = 4096;
// With no more query rows than this a page takes longer to read than to multiply on tiles.
[[maybe_unused]] constexpr int ROWS_TO_READ = 64;

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

// Codes and bounds of pages; place[b] is the row in both of block b of the request at hand.
struct Codes {
    const std::uint8_t* code = nullptr;
    const float* bound = nullptr;
    const std::int32_t* place = nullptr;
};

// Some tokens' queries, a row for each token and group.
struct Queries {
    int rows = 0, groups = 0, quads = 0, padded = 0;
    // Rows with those that fill the last tile.
    int stride() const { return (rows + ROWS - 1) / ROWS * ROWS; }
    std::vector<float> value, scale, norm, rest, threshold;
    // `others`: how many blocks compete for a row's free places.
    std::vector<std::int32_t> word, offset, others;
    std::vector<std::int8_t> code;

    template <class T>
    void read(const T* q, std::int64_t stride_t, std::int64_t stride_g, int tokens, const Keys& keys) {
        rows = tokens * groups, quads = keys.quads(), padded = keys.padded();
        value.resize(std::size_t(rows) * padded), scale.resize(stride()), norm.resize(stride()), rest.resize(stride());
        threshold.resize(stride()), others.assign(stride(), 0);
        word.resize(std::size_t(stride()) * quads * WORDS), offset.resize(stride()), code.resize(padded + QUAD);
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

struct Statistics {
    // Scanned: blocks times query rows. Bytes: of codes (of keys where there are none), each read once for many rows.
    std::int64_t scanned = 0, rescored_blocks = 0, rescored_keys = 0, bytes = 0;

    void add(const Statistics& other) {
        scanned += other.scanned, rescored_blocks += other.rescored_blocks, rescored_keys += other.rescored_keys, bytes += other.bytes;
    }
};

// The best blocks of each of LANES query rows, best first: larger scores, then those that came first.
class Best {
public:
    // NaN is a free place: no score is at most that.
    explicit Best(int room) : score_(room, splat(std::numeric_limits<float>::quiet_NaN())), block_(room) {}

    void add(vfloat score, std::int32_t block) {
        if (!bits(~(score <= score_.back()))) return;
        vint shifted{}, number = splat(block);
        for (std::size_t k = 0; k < score_.size(); k++) {
            const vfloat other = score_[k];
            const vint other_number = block_[k];
            shifted |= ~(score <= other);
            score_[k] = shifted ? score : other, block_[k] = shifted ? number : other_number;
            score = shifted ? other : score, number = shifted ? other_number : number;
        }
    }

    vfloat worst() const { return score_.back(); }
    std::int32_t block(int k, int lane) const { return block_[k][lane]; }

private:
    std::vector<vfloat> score_;
    std::vector<vint> block_;
};

// Selection for the tokens of one request.
template <class T>
class Selection {
public:
    Selection(const Keys& keys, Codes codes, const std::int32_t* page, std::int64_t blocks, int num_selected, int num_local)
        : keys_(keys), codes_(codes), page_(page), num_selected_(num_selected), num_local_(num_local) {
        if (!codes_.code) return;
        scale_.resize(blocks), loose_.resize(blocks), norm_.resize(blocks);
        const float slack = (keys.width + 32) * 1.2e-7f;
        for (std::int64_t b = 0; b < blocks; b++) {
            const float* bound = codes_.bound + 3 * std::int64_t(codes_.place[b]);
            scale_[b] = bound[0], norm_[b] = bound[2];
            loose_[b] = bound[1] + slack * (bound[1] + bound[2]);
        }
    }

    // out[b * q.stride() + i]: the estimate for query row i of each block b from first to last.
    void estimate(const Queries& q, std::int64_t first, std::int64_t last, float* out) const {
        if (!codes_.code) {
            for (std::int64_t b = first; b < last; b++)
                for (int i = 0; i < q.rows; i++) out[b * q.stride() + i] = exact(q, i, b);
            return;
        }
        const int vectors = keys_.block / LANES;
#if defined(__AMX_INT8__)
        // Few rows wait for memory, and vectors read it faster than tiles.
        if (q.quads % TILE == 0 && q.rows > MAX_QUERIES) {
            const Tiles tiles;
            if (q.rows > ROWS_TO_READ && vectors % PAGES == 0)
                scan<1, ROWS>(q, first, last, out, [&](int, auto... to) { tile_maxima<1>(vectors, q.quads, to...); });
            else
                scan<PAGES, ROWS>(q, first, last, out, [&](int, auto... to) { tile_maxima<PAGES>(vectors, q.quads, to...); });
            return;
        }
#endif
        scan<PAGES, MAX_QUERIES>(q, first, last, out, [&](int rows, auto... to) { MAXIMA[rows - 1](vectors, q.quads, to...); });
    }

    // How many blocks compete for the free places of a token in block `own`; none where all of them fit.
    std::int32_t others(std::int64_t own) const {
        const std::int64_t count = own - num_local_ + 1;
        return room() > 0 && count > room() ? std::int32_t(count) : 0;
    }

    // What the scores of the blocks that LANES query rows from i on select are not below.
    void bound(Queries& q, int i, const float* estimate) const {
        Best low(room());
        const vint others = load(&q.others[i]);
        for (std::int64_t b = 0; b < most_others(q, i); b++) {
            const vfloat end = load(estimate + b * q.stride() + i) - width(q, i, b, estimate);
            low.add((others > std::int32_t(b)) & (end == end) ? end : splat(-INF), 0);
        }
        store(&q.threshold[i], low.worst());
    }

    // Replaces the estimates of block b by scores, exact where they reach the threshold and otherwise smaller.
    void rescore(const Queries& q, std::int64_t b, float* estimate, Statistics& stats) const {
        float* score = estimate + b * q.stride();
        int row[ROWS], count = 0;
        float wide[ROWS];
        for (int i = 0; i < q.rows; i += LANES) {
            const vfloat w = width(q, i, b, estimate), e = load(score + i);
            unsigned found = ~bits(e + w < load(&q.threshold[i])) & bits(load(&q.others[i]) > std::int32_t(b));
            store(score + i, splat(-INF));
            stats.rescored_blocks += std::popcount(found);
            for (; found; found &= found - 1) {
                const int k = std::countr_zero(found);
                row[count] = i + k, wide[count++] = w[k];
                if (count == ROWS) rescore_rows(q, b, row, wide, std::exchange(count, 0), score, stats);
            }
        }
        if (count) rescore_rows(q, b, row, wide, count, score, stats);
    }

    // The selections of up to LANES query rows from i on; row i + k stands in block own[k] and its ids go to out[k].
    void choose(const Queries& q, int i, const std::int64_t* own, const float* score, std::int32_t* const* out) const {
        Best best(std::max(room(), 1));
        const vint others = load(&q.others[i]);
        for (std::int64_t b = 0; b < most_others(q, i); b++) {
            const vfloat x = load(score + b * q.stride() + i);
            best.add(others > std::int32_t(b) ? x : splat(-INF), std::int32_t(b));
        }
        for (int k = 0; k < std::min(LANES, q.rows - i); k++) {
            std::int32_t* id = out[k];
            const std::int32_t last = std::int32_t(own[k]), forced = std::max(0, last - num_local_ + 1);
            if (q.others[i + k]) {
                for (int r = 0; r < room(); r++) *id++ = best.block(r, k);
                std::sort(out[k], id);
            } else {
                const int free = num_selected_ - (last - forced + 1);
                for (std::int32_t b = 0; b < std::min(forced, free); b++) *id++ = b;
            }
            for (std::int32_t b = forced; b <= last; b++) *id++ = b;
            std::fill(id, out[k] + num_selected_, -1);
        }
    }

private:
    const std::uint8_t* code_of(std::int64_t b) const { return codes_.code + codes_.place[b] * keys_.code_bytes(); }

    // Estimates by the maxima of N pages and at most Q query rows at a time.
    template <int N, int Q, class Maxima>
    void scan(const Queries& q, std::int64_t first, std::int64_t last, float* out, const Maxima& maxima) const {
        for (std::int64_t b = first; b < last; b += N) {
            const int pages = int(std::min<std::int64_t>(N, last - b));
            const std::uint8_t* code[N];
            for (int p = 0; p < N; p++) code[p] = code_of(b + std::min(p, pages - 1));
            for (int i = 0; i < q.rows; i += Q) {
                const int rows = std::min(Q, q.rows - i);
                std::int32_t best[N][ROWS];
                maxima(rows, code, &q.word[std::size_t(i) * q.quads * WORDS], best);
                for (int p = 0; p < pages; p++)
                    for (int k = 0; k < rows; k++)
                        out[(b + p) * q.stride() + i + k] = float(best[p][k] - q.offset[i + k]) * (scale_[b + p] * q.scale[i + k]);
            }
        }
    }

    float exact(const Queries& q, int i, std::int64_t b) const {
        float best = -INF;
        for (int s = 0; s < keys_.block; s++)
            best = std::max(best, exact_dot(&q.value[std::size_t(i) * q.padded], keys_.row<T>(page_[b], s), keys_.width));
        return best;
    }

    int room() const { return num_selected_ - num_local_; }
    static std::int32_t most_others(const Queries& q, int i) { return *std::max_element(&q.others[i], &q.others[i] + LANES); }

    // Half the bracket's width of LANES query rows from i on with block b; infinite where the numbers say nothing.
    vfloat width(const Queries& q, int i, std::int64_t b, const float* estimate) const {
        const vfloat width = load(&q.norm[i]) * loose_[b] + load(&q.rest[i]) * norm_[b];
        const vfloat e = load(estimate + b * q.stride() + i);
        return (width < INF) & (e * 0.0f == splat(0.0f)) ? width : splat(INF);
    }

    // Scores of block b for these query rows: only keys whose brackets, so wide, reach the row's threshold are looked at.
    void rescore_rows(const Queries& q, std::int64_t b, const int* row, const float* wide, int count, float* score,
                      Statistics& stats) const {
        // Keys are fetched while products go on, and multiplied afterwards: one after the other they would be waited for.
        struct Found {
            int row, slot;
        };
        std::vector<Found> keys;
        const auto look = [&](int k, int v, vint product) {
            const int i = row[k];
            const vfloat high = __builtin_convertvector(product - q.offset[i], vfloat) * (scale_[b] * q.scale[i]) + wide[k];
            unsigned found = ~bits(high < q.threshold[i]) & ((1u << LANES) - 1);
            for (; found; found &= found - 1) {
                keys.push_back({i, v * LANES + std::countr_zero(found)});
                const auto* key = reinterpret_cast<const char*>(keys_.row<T>(page_[b], keys.back().slot));
                for (std::size_t at = 0; at < keys_.width * sizeof(T); at += 64) __builtin_prefetch(key + at);
            }
        };
        const std::uint8_t* code = code_of(b);
        const int vectors = keys_.block / LANES;
#if defined(__AMX_INT8__)
        if (q.quads % TILE == 0 && vectors % PAGES == 0) {
            const Tiles tiles;
            std::vector<std::int32_t> word(std::size_t(ROWS) * q.quads);
            for (int k = 0; k < count; k++)
                std::copy_n(&q.word[std::size_t(row[k]) * q.quads], q.quads, &word[std::size_t(k) * q.quads]);
            for (int v = 0; v < vectors; v += PAGES) {
                const std::uint8_t* key[PAGES];
                for (int n = 0; n < PAGES; n++) key[n] = vector_of(code, v + n, q.quads);
                vint product[PAGES][ROWS];
                tile_products(key, word.data(), q.quads, product);
                for (int k = 0; k < count; k++)
                    for (int n = 0; n < PAGES; n++) look(k, v + n, product[n][k]);
            }
            count = 0;
        }
#endif
        for (int k = 0; k < count; k++)
            for (int v = 0; v < vectors; v++) {
                const std::uint8_t* key[1] = {vector_of(code, v, q.quads)};
                vint total[1][1];
                products<1, 1>(key, &q.word[std::size_t(row[k]) * q.quads * WORDS], q.quads, total);
                look(k, v, total[0][0]);
            }
        for (const auto [i, slot] : keys) {
            const float* query = &q.value[std::size_t(i) * q.padded];
            score[i] = std::max(score[i], exact_dot(query, keys_.row<T>(page_[b], slot), keys_.width));
        }
        stats.rescored_keys += keys.size();
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

    // How many blocks request r scores: those before its last token's local ones, none where all of them fit. Every key
    // of these is there.
    std::int64_t scored(int r) const {
        if (batch.count(r) == 0) return 0;
        const std::int64_t last = batch.position(r, batch.start[r + 1] - 1) / keys.block;
        const bool all = last < num_selected || num_local == num_selected;
        return all ? 0 : std::max<std::int64_t>(0, last - num_local + 1);
    }
};

// The tokens of request r, on so many threads.
template <class T, class Q>
Statistics select_request(const Call& call, int r, const Q* q, std::int64_t stride_t, std::int64_t stride_g, int threads) {
    const Batch& batch = call.batch;
    const Keys& keys = call.keys;
    const int groups = call.groups;
    const std::int64_t begin = batch.start[r], end = batch.start[r + 1];
    Statistics stats;
    if (begin == end) return stats;
    // Kept from call to call: fresh memory costs a fault a page.
    thread_local std::vector<float> scratch;
    thread_local Queries queries;
    queries.groups = groups;
    OwnCodes own_codes;
    const std::int32_t* page = batch.pages(r);
    const std::int64_t scored = call.scored(r);
    Codes codes{call.code, call.bound, page};
    if (!codes.code && scored && (end - begin) * groups >= QUERIES_TO_ENCODE) codes = own_codes.make<T>(keys, page, scored, threads);
    const Selection<T> selection(keys, codes, page, scored, call.num_selected, call.num_local);
    const std::int64_t step = std::clamp<std::int64_t>(ESTIMATES_AT_ONCE / (std::max<std::int64_t>(scored, 1) * groups), 1, 4096);
    for (std::int64_t first = begin; first < end; first += step) {
        // Other threads of the team have `queries` and `scratch` of their own: they are given these.
        Queries& rows = queries;
        rows.read(q + first * stride_t, stride_t, stride_g, int(std::min(step, end - first)), keys);
        scratch.resize(std::max(scratch.size(), std::size_t(scored) * rows.stride()));
        float* const estimates = scratch.data();
        std::vector<std::int64_t> own(rows.stride());
        std::vector<std::int32_t*> out(rows.stride());
        for (int i = 0; i < rows.rows; i++) {
            const std::int64_t t = first + i / groups;
            own[i] = batch.position(r, t) / keys.block;
            rows.others[i] = selection.others(own[i]);
            out[i] = call.out + (t * groups + i % groups) * call.num_selected;
        }
        std::int64_t blocks = 0, tokens = 0;
#pragma omp parallel num_threads(threads) reduction(+ : blocks, tokens)
        {
#pragma omp for schedule(dynamic)
            for (std::int64_t b = 0; b < scored; b += PAGES_AT_ONCE)
                selection.estimate(rows, b, std::min(b + PAGES_AT_ONCE, scored), estimates);
            if (codes.code && scored) {
#pragma omp for schedule(dynamic)
                for (int i = 0; i < rows.rows; i += LANES) selection.bound(rows, i, estimates);
                Statistics mine;
#pragma omp for schedule(dynamic, PAGES_AT_ONCE)
                for (std::int64_t b = 0; b < scored; b++) selection.rescore(rows, b, estimates, mine);
                blocks += mine.rescored_blocks, tokens += mine.rescored_keys;
            }
#pragma omp for schedule(dynamic)
            for (int i = 0; i < rows.rows; i += LANES) selection.choose(rows, i, &own[i], estimates, &out[i]);
        }
        stats.add({scored * rows.rows, blocks, tokens,
                   scored * (codes.code ? keys.code_bytes() : keys.block * keys.width * std::int64_t(sizeof(T)))});
    }
    return stats;
}

// Large requests one after another, each on all threads; then the small ones side by side, where threads need not meet.
template <class T, class Q>
Statistics select(const Call& call, const Q* q, std::int64_t stride_t, std::int64_t stride_g) {
    const Batch& batch = call.batch;
    Statistics stats;
    std::vector<int> small;
    for (int r = 0; r < batch.requests; r++) {
        const std::int64_t rows = batch.count(r) * call.groups;
        if (call.threads > 1 && rows <= LANES && rows * call.scored(r) <= SCORES_ON_ONE_THREAD) small.push_back(r);
        else stats.add(select_request<T>(call, r, q, stride_t, stride_g, call.threads));
    }
    const int team = std::min(call.threads, int(small.size()));
    if (team < 2) {
        for (const int r : small) stats.add(select_request<T>(call, r, q, stride_t, stride_g, call.threads));
        return stats;
    }
    std::vector<Statistics> each(small.size());
#pragma omp parallel for num_threads(team) schedule(dynamic)
    for (std::size_t i = 0; i < small.size(); i++) each[i] = select_request<T>(call, small[i], q, stride_t, stride_g, 1);
    for (const Statistics& mine : each) stats.add(mine);
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

// A page of which one slot is named has one new key, and its codes stand for the others already; but its first key means a
// new page, and its last is a good time to forget what other keys did to the bounds.
template <class T>
void encode_slots(const Keys& keys, const std::int64_t* slot, std::size_t count, std::uint8_t* code, float* bound) {
    const std::int64_t page = slot[0] / keys.block;
    const int first = int(slot[0] % keys.block);
    if (count == 1 && first > 0 && first < keys.block - 1 && encode_key<T>(keys, page, first, code, bound)) return;
    encode_page<T>(keys, page, code, bound);
}

void encode_pages(const Tensor& index_k, const Tensor& slots, const Tensor& code, const Tensor& bound, int threads) {
    const Keys keys = keys_of(index_k);
    check_codes(keys, code, bound);
    std::vector<std::int64_t> slot = integers(slots, "slot_T");
    for (const std::int64_t s : slot)
        if (s < 0 || s >= std::int64_t(keys.pages) * keys.block)
            throw std::invalid_argument("slot " + std::to_string(s) + " is outside the pool");
    std::sort(slot.begin(), slot.end());
    // Where each page's slots begin.
    std::vector<std::size_t> begin;
    for (std::size_t i = 0; i < slot.size(); i++)
        if (i == 0 || slot[i] / keys.block != slot[i - 1] / keys.block) begin.push_back(i);
    const std::size_t pages = begin.size();
    begin.push_back(slot.size());
    auto* codes = data_of<std::uint8_t>(code, "code_MC");
    auto* bounds = data_of<float>(bound, "bound_M3");
    const bool wide = is_float32(index_k);
    if (!wide && !is_bfloat16(index_k)) throw std::invalid_argument("index keys must be float32 or bfloat16");
    const int team = pages > 8 && slot.size() > pages ? threads : 1;
#pragma omp parallel for num_threads(team) schedule(dynamic, 4)
    for (std::size_t i = 0; i < pages; i++) {
        const std::int64_t page = slot[begin[i]] / keys.block;
        const std::size_t count = begin[i + 1] - begin[i];
        std::uint8_t* c = codes + page * keys.code_bytes();
        if (wide) encode_slots<float>(keys, &slot[begin[i]], count, c, bounds + 3 * page);
        else encode_slots<bfloat16>(keys, &slot[begin[i]], count, c, bounds + 3 * page);
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
    return nb::make_tuple(stats.scanned, stats.rescored_blocks, stats.rescored_keys, stats.bytes);
}

}  // namespace

void bind_index(nb::module_& m) {
    m.def("encode_pages", &encode_pages, nb::arg("index_k_MBJ"), nb::arg("slot_T"), nb::arg("code_MC"), nb::arg("bound_M3"),
          nb::arg("threads"), "Write codes and bounds of the pages that hold some slots.");
    m.def("select_blocks", &select_blocks, nb::arg("index_q_TGJ"), nb::arg("index_k_MBJ"), nb::arg("code_MC").none(),
          nb::arg("bound_M3").none(), nb::arg("page_RP"), nb::arg("start_R1"), nb::arg("length_R"), nb::arg("num_selected"),
          nb::arg("num_local"), nb::arg("block_TGK"), nb::arg("threads"),
          "Fill block_TGK; returns blocks scanned, blocks and keys rescored, and bytes scanned.");
}

}  // namespace openm3
