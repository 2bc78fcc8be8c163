// Attention over selected blocks, and over all of them: tiles of neighbouring tokens walk the union of their blocks.
//
// The lanes of a vector are query rows: the heads of a group, of as many tokens as fit. So keys and values are read as
// they lie, one number broadcast at a time, no product needs a transposed copy, and the softmax runs down the keys in
// every lane at once. A tile's accumulators stay in the second-level cache while its blocks pass by; only the rows that
// chose a block meet it. Three classes multiply: VectorProducts anywhere (products.h), ManyRows and FewRows on tiles (matrix.h).
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention/matrix.h"
#include "attention/products.h"
#include "attention/rows.h"
#include "native/simd.h"
#include "native/tensors.h"

namespace openm3 {
namespace {

// What a tile's queries and accumulators may take of the second-level cache.
constexpr std::int64_t TILE_BYTES = 1 << 20;
constexpr int MAX_TILE_TOKENS = 256;
// How many tiles of few rows meet a block together.
constexpr std::size_t MOST_TOGETHER = 16;

// How query rows of one group lie in vectors: `tokens` of them to a vector, or `vectors` to a token.
struct Packing {
    int tokens, vectors, heads;

    explicit Packing(int heads_per_group)
        : tokens(std::max(1, LANES / heads_per_group)), vectors((heads_per_group + LANES - 1) / LANES), heads(heads_per_group) {}
    int count(int num_tokens) const { return (num_tokens + tokens - 1) / tokens * vectors; }
    // The first token of vector v, and its first head.
    int token(int v) const { return v / vectors * tokens; }
    int head(int v) const { return v % vectors * LANES; }
};

// Some tokens of one request, one group, and which part of their blocks: what one thread does at a time.
struct Task {
    int request, group, tokens, part, parts;
    std::int64_t first;
    // Where the partial results go if there are several parts.
    std::int64_t partial;
};

std::size_t partial_floats(const Call& call, const Packing& packing, int tokens) {
    return std::size_t(packing.count(tokens)) * LANES * (call.width + 2);
}

constexpr std::int32_t NO_BLOCK = std::numeric_limits<std::int32_t>::max();

// One block and a vector with rows that read it: bit i for the vector's i-th token.
struct Member {
    std::int32_t block, vector;
    std::uint32_t tokens;
};

// ---- one tile

// Call `begin`, then `meet` for each block, then `end`.
template <class T, class Q, class Products>
class Tile {
public:
    using Where = Place<T>;

    // The room comes out of `scratch`, but for that of the scores, which tiles can share: they do not outlast a block.
    Tile(const Call& call, const Task& task, const Packing& packing, Scratch& scratch, float* score)
        : call_(call), task_(task), packing_(packing), vectors_(packing.count(task.tokens)), products_(call, vectors_, scratch) {
        const std::size_t rows = std::size_t(vectors_) * LANES;
        out_ = scratch.take(rows * call.width), top_ = scratch.take(rows), sum_ = scratch.take(rows);
        for (int r = 0; r < Products::TOGETHER; r++) score_[r] = score + r * score_floats(call) / Products::TOGETHER;
    }

    static std::size_t floats(const Call& call, int vectors) {
        return std::size_t(vectors) * LANES * (call.width + 2) + 64 + Products::floats(call, vectors);
    }

    static std::size_t score_floats(const Call& call) { return Products::TOGETHER * std::size_t(call.block) * LANES; }

    void begin() {
        read_queries();
        std::fill_n(out_, std::size_t(vectors_) * LANES * call_.width, 0.0f);
        std::fill_n(top_, vectors_ * LANES, -INF);
        std::fill_n(sum_, vectors_ * LANES, 0.0f);
        if (call_.chosen) list_members();
        else members_.resize(vectors_);
        const std::int64_t blocks = call_.chosen ? begins_.size() - 1 : position(task_.tokens - 1) / call_.block + 1;
        at_ = std::size_t(blocks * task_.part / task_.parts), last_ = std::size_t(blocks * (task_.part + 1) / task_.parts);
    }

    // The block to be met next and the one after it, NO_BLOCK after the last. They come in ascending order.
    std::int32_t next() const { return block(at_); }
    std::int32_t after() const { return block(at_ + 1); }

    // Where a block's keys and values are.
    Place<T> place(std::int32_t block) const {
        const std::int64_t page = call_.batch.pages(task_.request)[block];
        return {call_.k.block<T>(page, task_.group), call_.v.block<T>(page, task_.group)};
    }

    // Meet the next block, and fetch what lies at `ahead` in the meantime, if anything does.
    void meet(Place<T> ahead) {
        if (call_.chosen) {
            attend(&members_[begins_[at_]], int(begins_[at_ + 1] - begins_[at_]), ahead);
        } else {
            for (int v = 0; v < vectors_; v++) members_[v] = {next(), v, ~0u};
            attend(members_.data(), vectors_, ahead);
        }
        at_++;
    }

    void end() {
        for (int v = 0; v < vectors_; v++) products_.settle(out_ + std::size_t(v) * LANES * call_.width);
    }

    // Write the finished rows.
    void finish() const {
        for (int v = 0; v < vectors_; v++) {
            Q* to[LANES] = {};
            float share[LANES];
            for_lanes(v, [&](int lane, std::int64_t token, int head) {
                const float total = sum_[v * LANES + lane];
                share[lane] = total > 0.0f || total != total ? 1.0f / total : 0.0f;
                to[lane] = static_cast<Q*>(call_.out) + (token * call_.heads + head) * call_.width;
                if (call_.lse) call_.lse[token * call_.heads + head] = top_[v * LANES + lane] + std::log(total);
            });
            const float* from = out_ + std::size_t(v) * LANES * call_.width;
            int h = 0;
            for (; h + LANES <= call_.width; h += LANES) {
                vint row[LANES];
                for (int i = 0; i < LANES; i++) row[i] = (vint)load(from + (h + i) * LANES);
                transpose(row);
                for (int n = 0; n < LANES; n++)
                    if (to[n]) store(to[n] + h, (vfloat)row[n] * share[n]);
            }
            for (; h < call_.width; h++)
                for (int n = 0; n < LANES; n++)
                    if (to[n]) to[n][h] = from_float<Q>(from[h * LANES + n] * share[n]);
        }
    }

    // Partial results, to be merged: accumulators, then tops, then sums.
    void keep(float* to) const {
        const std::size_t rows = std::size_t(vectors_) * LANES;
        std::copy_n(out_, rows * call_.width, to);
        std::copy_n(top_, rows, to + rows * call_.width);
        std::copy_n(sum_, rows, to + rows * (call_.width + 1));
    }

    void merge(const float* parts, int count, std::size_t stride) {
        const std::size_t rows = std::size_t(vectors_) * LANES, width = call_.width;
        std::fill_n(out_, rows * width, 0.0f);
        for (std::size_t v = 0; v < rows; v += LANES) {
            vfloat top = splat(-INF), total{};
            for (int p = 0; p < count; p++) top = max(load(parts + p * stride + rows * width + v), top);
            const vfloat base = top == -INF ? splat(0.0f) : top;
            for (int p = 0; p < count; p++) {
                const float* part = parts + p * stride;
                const vfloat share = exp(load(part + rows * width + v) - base);
                total += load(part + rows * (width + 1) + v) * share;
                for (std::size_t h = 0; h < width; h++)
                    store(out_ + v * width + h * LANES, load(out_ + v * width + h * LANES) + load(part + v * width + h * LANES) * share);
            }
            store(top_ + v, top), store(sum_ + v, total);
        }
    }

private:
    // The rows of vector v: f(lane, token, head).
    template <class F>
    void for_lanes(int v, F&& f) const {
        for (int i = 0; i < packing_.tokens && packing_.token(v) + i < task_.tokens; i++)
            for (int n = 0; n < LANES && packing_.head(v) + n < packing_.heads; n++)
                f(i * packing_.heads + n, task_.first + packing_.token(v) + i, task_.group * packing_.heads + packing_.head(v) + n);
    }

    void read_queries() {
        for (int v = 0; v < vectors_; v++) {
            const Q* row[LANES] = {};
            for_lanes(v, [&](int lane, std::int64_t token, int head) {
                row[lane] = static_cast<const Q*>(call_.q) + token * call_.stride_t + head * call_.stride_n;
            });
            products_.read(v, row);
        }
    }

    std::int64_t position(int token) const { return call_.batch.position(task_.request, task_.first + token); }

    std::int32_t block(std::size_t i) const {
        if (i >= last_) return NO_BLOCK;
        return call_.chosen ? members_[begins_[i]].block : std::int32_t(i);
    }

    // Who reads which chosen block, by block and vector; `begins_` says where each block's are.
    void list_members() {
        members_.reserve(std::size_t(task_.tokens) * call_.num_chosen * packing_.vectors);
        for (int t = 0; t < task_.tokens; t++) {
            const std::int32_t* chosen = call_.chosen + ((task_.first + t) * call_.groups + task_.group) * call_.num_chosen;
            const std::int64_t own = position(t) / call_.block;
            for (int k = 0; k < call_.num_chosen; k++)
                if (chosen[k] >= 0 && chosen[k] <= own)
                    for (int v = 0; v < packing_.vectors; v++)
                        members_.push_back({chosen[k], t / packing_.tokens * packing_.vectors + v, 1u << t % packing_.tokens});
        }
        std::sort(members_.begin(), members_.end(), [](const Member& a, const Member& b) {
            return a.block < b.block || (a.block == b.block && a.vector < b.vector);
        });
        std::size_t kept = 0;
        for (const Member& m : members_) {
            if (kept && members_[kept - 1].block == m.block && members_[kept - 1].vector == m.vector) members_[kept - 1].tokens |= m.tokens;
            else members_[kept++] = m;
        }
        members_.resize(kept);
        for (std::size_t i = 0; i < kept; i++)
            if (i == 0 || members_[i].block != members_[i - 1].block) begins_.push_back(i);
        begins_.push_back(kept);
    }

    // One block meets the vectors that have rows reading it.
    void attend(const Member* members, int count, Place<T> ahead) {
        const std::int64_t block = members[0].block;
        const std::int64_t keys = std::min<std::int64_t>(call_.block, position(task_.tokens - 1) + 1 - block * call_.block);
        products_.open(place(members[0].block), int(keys), ahead);
        int i = 0;
        for (; i + Products::TOGETHER <= count; i += Products::TOGETHER) attend<Products::TOGETHER>(members + i);
        if constexpr (Products::TOGETHER == 3)
            if (i + 2 <= count) attend<2>(members + i), i += 2;
        for (; i < count; i++) attend<1>(members + i);
    }

    template <int R>
    void attend(const Member* members) {
        int vector[R], keys = 0;
        vint seen[R];
        for (int r = 0; r < R; r++) vector[r] = members[r].vector, seen[r] = visible(members[r], keys);
        if (keys == 0) return;
        if constexpr (requires { &Products::meet; }) {
            products_.meet(keys, seen[0], top_, sum_, out_);
        } else {
            multiply<R>(vector, keys, seen);
        }
    }

    template <int R>
    void multiply(const int* vector, int keys, const vint* seen) {
        products_.template scores<R>(vector, keys, score_);
        vfloat share[R];
        float* out[R];
        for (int r = 0; r < R; r++) {
            share[r] = softmax(score_[r], keys, seen[r], vector[r]);
            out[r] = out_ + std::size_t(vector[r]) * LANES * call_.width;
        }
        products_.template values<R>(score_, keys, share, out);
    }

    // How many of the block's keys each row sees; `keys` becomes the most that any does.
    vint visible(const Member& m, int& keys) const {
        vint seen{};
        for (int i = 0; i < packing_.tokens && packing_.token(m.vector) + i < task_.tokens; i++) {
            if (!(m.tokens >> i & 1)) continue;
            const std::int64_t last = position(packing_.token(m.vector) + i) - std::int64_t(m.block) * call_.block;
            const int count = int(std::clamp<std::int64_t>(last + 1, 0, call_.block));
            keys = std::max(keys, count);
            const int lanes = std::min(packing_.heads, LANES);
            for (int n = 0; n < lanes; n++) seen[i * packing_.heads % LANES + n] = count;
        }
        return seen;
    }

    // Scores become weights, in place; returns what earlier sums are to be multiplied with.
    vfloat softmax(float* score, int keys, vint seen, int vector) {
        vfloat top = load(top_ + vector * LANES);
        const vfloat before = top;
        const bool masked = bits(seen < keys) != 0;
        for (int s = 0; s < keys; s++) {
            vfloat x = load(score + s * LANES) * call_.scale;
            if (masked) x = splat(s) < seen ? x : splat(-INF);
            store(score + s * LANES, x);
            top = max(x, top);
        }
        const vfloat base = top == -INF ? splat(0.0f) : top;
        vfloat total{};
        for (int s = 0; s < keys; s++) {
            products_.fetch_ahead();
            const vfloat p = exp(load(score + s * LANES) - base);
            store(score + s * LANES, p);
            total += p;
        }
        const vfloat share = exp(before - base);
        store(top_ + vector * LANES, top);
        store(sum_ + vector * LANES, load(sum_ + vector * LANES) * share + total);
        return share;
    }

    const Call& call_;
    const Task& task_;
    const Packing& packing_;
    int vectors_;
    Products products_;
    float *out_, *top_, *sum_;
    float* score_[Products::TOGETHER];
    std::vector<Member> members_;
    std::vector<std::size_t> begins_;
    std::size_t at_ = 0, last_ = 0;
};

// The work of a step. How a request is cut depends on nothing but itself and the threads, so that its results are the same
// to the last bit whatever else is in the batch. A request of few tasks is cut into parts of its blocks as well.
std::vector<Task> tasks_of(const Call& call, const Packing& packing, std::size_t& partials) {
    const std::int64_t row_bytes = std::int64_t(2) * call.width * 4 * LANES * packing.vectors / packing.tokens;
    const std::int64_t fit = std::clamp<std::int64_t>(TILE_BYTES / std::max<std::int64_t>(1, row_bytes), 1, MAX_TILE_TOKENS);
    const int wanted = call.threads == 1 ? 1 : 2 * call.threads;
    std::vector<Task> tasks;
    for (int r = 0; r < call.batch.requests; r++) {
        const std::int64_t count = call.batch.count(r), end = call.batch.start[r + 1];
        if (count == 0) continue;
        std::int64_t step = std::min(fit, std::max<std::int64_t>(16, count * call.groups / wanted));
        step = std::max<std::int64_t>(packing.tokens, step / packing.tokens * packing.tokens);
        const int own = int((count + step - 1) / step) * call.groups, parts = own >= wanted ? 1 : (wanted + own - 1) / own;
        for (std::int64_t first = call.batch.start[r]; first < end; first += step)
            for (int g = 0; g < call.groups; g++)
                for (int p = 0; p < parts; p++) {
                    const int tokens = int(std::min(step, end - first));
                    tasks.push_back({r, g, tokens, p, parts, first, std::int64_t(partials)});
                    if (parts > 1) partials += partial_floats(call, packing, tokens);
                }
    }
    // The same part of several requests stands side by side: they can walk together.
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) {
        return std::tie(a.group, a.parts, a.part) < std::tie(b.group, b.parts, b.part);
    });
    return tasks;
}

// Tasks from `first` to `last`, which one thread does together.
struct Walk {
    std::size_t first, last;
};

template <class Few>
bool few_rows(const Call& call, const Packing& packing, const Task& task) {
    return Few::takes(call, packing.count(task.tokens), task.tokens * packing.heads);
}

// Requests often share pages, and a page that several read comes from memory once if they meet it at the same time. So
// tasks of few rows on the same heads and parts of their requests walk together, as long as every thread has two walks.
template <class Few>
std::vector<Walk> walks_of(const Call& call, const Packing& packing, const std::vector<Task>& tasks) {
    const std::size_t most = std::clamp<std::size_t>(tasks.size() / (2 * call.threads), 1, MOST_TOGETHER);
    std::vector<Walk> walks;
    for (std::size_t i = 0; i < tasks.size(); i++) {
        const Task& task = tasks[i];
        if (!walks.empty() && i - walks.back().first < most) {
            const Task& before = tasks[i - 1];
            if (few_rows<Few>(call, packing, task) && few_rows<Few>(call, packing, before) && before.group == task.group &&
                before.parts == task.parts && before.part == task.part) {
                walks.back().last = i + 1;
                continue;
            }
        }
        walks.push_back({i, i + 1});
    }
    return walks;
}

template <class Tile>
void walk(const Call& call, const Packing& packing, const Task* tasks, std::size_t count, float* partial, Scratch& scratch) {
    std::size_t room = Tile::score_floats(call) + 16;
    for (std::size_t i = 0; i < count; i++) room += Tile::floats(call, packing.count(tasks[i].tokens));
    scratch.reserve(room);
    float* const score = scratch.take(Tile::score_floats(call));
    std::vector<Tile> tiles;
    tiles.reserve(count);
    for (std::size_t i = 0; i < count; i++) tiles.emplace_back(call, tasks[i], packing, scratch, score).begin();
    std::int32_t block = NO_BLOCK;
    for (const Tile& tile : tiles) block = std::min(block, tile.next());
    while (block != NO_BLOCK) {
        std::int32_t next = NO_BLOCK;
        const Tile* ahead = nullptr;
        for (const Tile& tile : tiles) {
            const std::int32_t then = tile.next() == block ? tile.after() : tile.next();
            if (then < next) next = then, ahead = &tile;
        }
        auto place = ahead ? ahead->place(next) : typename Tile::Where{};
        for (Tile& tile : tiles)
            if (tile.next() == block) tile.meet(std::exchange(place, {}));
        block = next;
    }
    for (std::size_t i = 0; i < count; i++) {
        tiles[i].end();
        if (tasks[i].parts == 1) tiles[i].finish();
        else tiles[i].keep(partial + tasks[i].partial);
    }
}

template <class T, class Q, class Many, class Few>
void attention_with(const Call& call) {
    const Packing packing(call.heads_per_group());
    std::size_t partials = 0;
    const std::vector<Task> tasks = tasks_of(call, packing, partials);
    const std::vector<Walk> walks = walks_of<Few>(call, packing, tasks);
    std::vector<float> partial(partials);
#pragma omp parallel num_threads(call.threads)
    {
        thread_local Scratch scratch;
        [[maybe_unused]] const typename Many::Session session;
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < walks.size(); i++) {
            const Task* first = &tasks[walks[i].first];
            const std::size_t count = walks[i].last - walks[i].first;
            if (few_rows<Few>(call, packing, *first)) walk<Tile<T, Q, Few>>(call, packing, first, count, partial.data(), scratch);
            else walk<Tile<T, Q, Many>>(call, packing, first, count, partial.data(), scratch);
        }
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < tasks.size(); i++) {
            const Task& task = tasks[i];
            if (task.parts == 1 || task.part != 0) continue;
            using Whole = Tile<T, Q, Many>;
            scratch.reserve(Whole::floats(call, packing.count(task.tokens)));
            Whole tile(call, task, packing, scratch, nullptr);
            tile.merge(&partial[task.partial], task.parts, partial_floats(call, packing, task.tokens));
            tile.finish();
        }
    }
}

template <class T, class Q>
void attention(const Call& call) {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<T, bfloat16>)
        if (ManyRows<Q>::takes(call)) return attention_with<T, Q, ManyRows<Q>, FewRows<Q>>(call);
#endif
    attention_with<T, Q, VectorProducts<T, Q>, RowProducts<T, Q>>(call);
}

// ---- Python

Pool pool_of(const Tensor& x, const char* name) {
    expect(x, name, 4);
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

void check_chosen(const std::int32_t* chosen, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i++)
        if (chosen[i] < -1) throw std::invalid_argument("block ids must be -1 or more, not " + std::to_string(chosen[i]));
}

void attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& page, const Tensor& start, const Tensor& length,
            std::optional<Tensor> chosen, float scale, const Tensor& out, std::optional<Tensor> lse, int threads) {
    expect(q, "q_TNH", 3);
    expect_dense(out, "out_TNH", 3);
    const Pool keys = pool_of(k, "k_MGBH"), values = pool_of(v, "v_MGBH");
    const std::int64_t tokens = std::int64_t(q.shape(0));
    for (int i = 0; i < 4; i++)
        if (k.shape(i) != v.shape(i)) throw std::invalid_argument("k and v differ in shape");
    if (q.shape(2) != k.shape(3) || k.shape(1) == 0 || q.shape(1) % k.shape(1) || q.shape(1) == 0)
        throw std::invalid_argument("q_TNH must be [T, N, H] with N a multiple of the groups of k");
    for (int i = 0; i < 3; i++)
        if (out.shape(i) != q.shape(i)) throw std::invalid_argument("out_TNH must be of the shape of q");
    const Batch batch = batch_of(page, start, length, tokens, std::int64_t(k.shape(0)), int(k.shape(2)));
    Call call{batch, keys, values, q.data(), q.stride(0), q.stride(1), nullptr, 0, int(q.shape(1)), int(k.shape(1)),
              int(k.shape(2)), int(k.shape(3)), scale, out.data(), nullptr, threads};
    if (chosen) {
        expect_dense(*chosen, "block_TGK", 3);
        if (std::int64_t(chosen->shape(0)) != tokens || chosen->shape(1) != k.shape(1))
            throw std::invalid_argument("block_TGK must be [T, G, K]");
        call.chosen = data_of<const std::int32_t>(*chosen, "block_TGK");
        call.num_chosen = int(chosen->shape(2));
        check_chosen(call.chosen, std::int64_t(chosen->size()));
    }
    if (lse) {
        expect_dense(*lse, "lse_TN", 2);
        if (std::int64_t(lse->shape(0)) != tokens || lse->shape(1) != q.shape(1)) throw std::invalid_argument("lse_TN must be [T, N]");
        call.lse = data_of<float>(*lse, "lse_TN");
    }
    const bool wide = is_float32(q), wide_cache = is_float32(k);
    if ((!wide && !is_bfloat16(q)) || (!wide_cache && !is_bfloat16(k)) || k.dtype() != v.dtype() || out.dtype() != q.dtype())
        throw std::invalid_argument("q, k and v must be float32 or bfloat16, out as q, v as k");
    nb::gil_scoped_release released;
    if (wide && wide_cache) attention<float, float>(call);
    else if (wide) attention<bfloat16, float>(call);
    else if (wide_cache) attention<float, bfloat16>(call);
    else attention<bfloat16, bfloat16>(call);
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attention", &attend, nb::arg("q_TNH"), nb::arg("k_MGBH"), nb::arg("v_MGBH"), nb::arg("page_RP"), nb::arg("start_R1"),
          nb::arg("length_R"), nb::arg("block_TGK").none(), nb::arg("scale"), nb::arg("out_TNH"), nb::arg("lse_TN").none(),
          nb::arg("threads"), "Fill out_TNH, and lse_TN if given; every visible block where block_TGK is None.");
}

}  // namespace openm3
