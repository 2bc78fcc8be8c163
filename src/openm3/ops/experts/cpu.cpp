// Routed experts, routing and the clamped SwiGLU, with float32 sums whatever the weights are stored as.
//
// Tokens are sorted by expert. An expert with many of them takes them in packed tiles (native/product.h); what comes out of
// its first product is packed again as it is activated. An expert with a few tokens takes dot products instead, bound by
// reading the weights once. Which of the two, and every order of summation, depend on the tokens of an expert alone: the
// result is the same for every number of threads.
#include <nanobind/stl/optional.h>
#include <omp.h>

#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "experts/experts.h"
#include "native/matrix.h"
#include "native/product.h"
#include "native/simd.h"
#include "native/tensors.h"

namespace openm3 {
namespace {

using std::int64_t;

// As many tokens of an expert, or fewer, are multiplied as dot products.
constexpr int FEW = 4;
// Products that are added one after the other: longer sums are made of several, for the rounding's sake.
constexpr int LONGEST_SUM = 256;
constexpr int GATE_PANEL = Product::PANEL / 2;
// Products below which a second thread costs more than it saves.
constexpr int64_t SERIAL = 1 << 18;
constexpr int64_t SERIAL_ACTIVATIONS = 1 << 14;
// Packed tokens and hidden channels held at a time.
constexpr int64_t FLOATS_AT_ONCE = 1 << 26;
constexpr int64_t TOKENS_AT_ONCE = 2048;

using Floats = Array<float>;

// ---- vectors

// Half (0 or 1) of every block of 2 W lanes, the blocks of a first.
template <int W, int Half>
struct Halves {
    static constexpr int lane(int i) {
        constexpr int blocks = LANES / (2 * W);
        const int block = i / W;
        return (block < blocks ? 0 : LANES) + block % blocks * 2 * W + Half * W + i % W;
    }
};

// The sums of N vectors (a power of two), in the first N lanes.
template <int N, int W = LANES / 2>
vfloat sums(const vfloat* x) {
    if constexpr (W == 0) {
        return x[0];
    } else {
        constexpr int pairs = N > 1 ? N / 2 : 1;
        vfloat y[pairs];
        for (int i = 0; i < pairs; i++) {
            const vfloat a = x[N > 1 ? 2 * i : 0], b = x[N > 1 ? 2 * i + 1 : 0];
            y[i] = pick<Halves<W, 0>>(a, b) + pick<Halves<W, 1>>(a, b);
        }
        return sums<pairs, W / 2>(y);
    }
}

vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }

vfloat activate(vfloat gate, vfloat up, float alpha, float limit) {
    gate = gate > limit ? splat(limit) : gate;
    up = up > limit ? splat(limit) : up;
    up = up < -limit ? splat(-limit) : up;
    return (up + 1.0f) * gate / (1.0f + exp(gate * -alpha));
}

// ---- dot products

// Rows of a dot product that fit in registers beside N tokens.
constexpr int rows_beside(int tokens) {
    int rows = 8;
    while (rows * tokens * 2 > REGISTERS) rows /= 2;
    return rows;
}

// out[r * stride_row + n * stride_token] = rows[r] . x[n] for N tokens.
template <int N, class W, class X>
void dots(const Row<W>* rows, int num_rows, const X* const* x, int64_t depth, float* out, int64_t stride_row, int64_t stride_token) {
    constexpr int R = rows_beside(N);
    constexpr int count = N * R, sum_at_once = std::min(LANES, count & -count);
    for (int first = 0; first < num_rows; first += R) {
        Row<W> row[R];
        for (int i = 0; i < R; i++) row[i] = rows[std::min(first + i, num_rows - 1)];
        // Long rows come from memory: the next ones are asked for in time.
        const bool far = depth * int64_t(sizeof(W)) >= 512;
        const W* soon[R];
        for (int i = 0; i < R; i++) soon[i] = rows[std::min(first + R + i, num_rows - 1)].data;
        float value[count] = {};
        for (int64_t k = 0; k < depth;) {
            const int64_t chunk = std::min(k + LONGEST_SUM * LANES, depth);
            vfloat total[count] = {};
            float by[R];
            const auto add = [&](auto from, int64_t k) {
                vfloat token[N];
                for (int n = 0; n < N; n++) token[n] = from(x[n] + k);
                for (int i = 0; i < R; i++) {
                    vfloat weight = from(row[i].data + k);
                    if constexpr (Row<W>::coded) weight *= by[i];
                    for (int n = 0; n < N; n++) total[n * R + i] += token[n] * weight;
                }
            };
            while (k < chunk) {
                const int64_t group = k / row[0].group, end = std::min((group + 1) * row[0].group, chunk);
                if constexpr (Row<W>::coded)
                    for (int i = 0; i < R; i++) by[i] = row[i].scale[group];
                for (; k + LANES <= end; k += LANES) {
                    if (far)
                        for (int i = 0; i < R; i++) __builtin_prefetch(soon[i] + k, 0, 2);
                    add([](const auto* p) { return load(p); }, k);
                }
                if (k < end) add([&](const auto* p) { return load_part(p, end - k); }, k);
                k = end;
            }
            for (int i = 0; i < count; i += sum_at_once) {
                float part[LANES];
                store(part, sums<sum_at_once>(total + i));
                for (int j = 0; j < sum_at_once; j++) value[i + j] += part[j];
            }
        }
        for (int n = 0; n < N; n++)
            for (int i = 0; i < std::min(R, num_rows - first); i++)
                out[(first + i) * stride_row + n * stride_token] = value[n * R + i];
    }
}

template <class W, class X>
void few_dots(int tokens, const Row<W>* rows, int num_rows, const X* const* x, int64_t depth, float* out, int64_t stride_row,
              int64_t stride_token) {
    static_assert(FEW == 4);
    const auto run = [&]<int N>(std::integral_constant<int, N>) {
        dots<N>(rows, num_rows, x, depth, out, stride_row, stride_token);
    };
    if (tokens == 1) run(std::integral_constant<int, 1>{});
    else if (tokens == 2) run(std::integral_constant<int, 2>{});
    else if (tokens == 3) run(std::integral_constant<int, 3>{});
    else run(std::integral_constant<int, 4>{});
}

// ---- experts

// Weights [E, R, depth] and, if they are int8 codes, scales [E, R, groups]; the last axis of both is dense.
struct Weights {
    const void* data;
    int64_t stride_expert, stride_row;
    bool is_float32;
    const float* scale;
    int64_t scale_expert, scale_row, group;

    template <class W>
    Row<W> row(int expert, int64_t r) const {
        const float* scales = scale ? scale + expert * scale_expert + r * scale_row : nullptr;
        return {static_cast<const W*>(data) + expert * stride_expert + r * stride_row, scales, group};
    }

    // Calls run(W) for the type they are stored as.
    template <class F>
    void with_type(F run) const {
        if (scale) run(std::int8_t{});
        else if (is_float32) run(float{});
        else run(bfloat16{});
    }
};

struct Call {
    int64_t tokens, width, inner;
    int num_experts, num_active, threads;
    float alpha, limit;
    const void* x;
    bool x_is_float32;
    int64_t stride_x;
    const std::int32_t* expert;
    const float* weight;
    Weights gate_up, down;
    void* out;
};

// Tokens of one expert that are multiplied together: places of the sorted order from `first` on. A few of them are rows
// instead of packed columns: `column` and `width` count those then.
struct Places : Tile {
    int expert;
    bool few;
    int64_t first;
};

// Places of a step's (token, expert) pairs sorted by expert, earlier tokens first, cut into tiles.
struct Plan {
    std::vector<std::int32_t> token;
    std::vector<float> weight;
    std::vector<Places> tiles;
    int64_t columns = 0, rows = 0;

    Plan(const Call& call, int64_t first_token, int64_t num_tokens) {
        const std::int32_t* expert = call.expert + first_token * call.num_active;
        const int64_t places = num_tokens * call.num_active;
        std::vector<int64_t> end(call.num_experts + 1);
        for (int64_t i = 0; i < places; i++) end[expert[i] + 1]++;
        for (int e = 0; e < call.num_experts; e++) end[e + 1] += end[e];
        for (int e = 0; e < call.num_experts; e++) cut(e, end[e], end[e + 1]);
        token.resize(places), weight.resize(places);
        for (int64_t i = 0; i < places; i++) {
            const int64_t place = end[expert[i]]++;
            token[place] = std::int32_t(i / call.num_active);
            weight[place] = call.weight[first_token * call.num_active + i];
        }
    }

    void cut(int expert, int64_t first, int64_t end) {
        const bool few = end - first <= FEW;
        while (first < end) {
            const int count = int(std::min<int64_t>(end - first, Product::WIDTH));
            const int width = few ? count : int(round_up(count, LANES));
            int64_t& used = few ? rows : columns;
            tiles.push_back({{count, width, used}, expert, few, first});
            first += count, used += width;
        }
    }
};

// A panel of an expert's gate and up rows and the tiles that it multiplies.
struct GatePanel {
    int64_t first;
    std::span<const Places> tiles;
};

// One step of a block of tokens: pack, multiply and activate, multiply back, each shared out over the threads.
class Step {
public:
    Step(const Call& call, int64_t first_token, int64_t num_tokens, int team)
        : call(call), first_token(first_token), num_tokens(num_tokens), plan(call, first_token, num_tokens),
          x_parts(call.x_is_float32 ? 3 : 1), hidden_parts(call.x_is_float32 ? 3 : 2),
          packed(array<Product::Packed>(Product::packed_size(plan.columns, call.width, x_parts))),
          hidden(array<Product::Packed>(Product::packed_size(plan.columns, call.inner, hidden_parts))),
          few_x(array<float>(plan.rows * call.width)), few_hidden(array<float>(plan.rows * call.inner)) {
        panel = Product::PANEL;
        while (panel > 16 && call.width < 4 * team * panel) panel /= 2;
        for (std::size_t i = 0, end; i < plan.tiles.size(); i = end) {
            for (end = i; end < plan.tiles.size() && end < i + Product::TILES_AT_ONCE && plan.tiles[end].expert == plan.tiles[i].expert;) end++;
            chunks.push_back({plan.tiles.data() + i, end - i});
            for (int64_t f = 0; f < call.inner; f += GATE_PANEL) gate_panels.push_back({f, chunks.back()});
        }
        private_floats = Product::PANEL * Product::TILES_AT_ONCE * Product::WIDTH + round_up(num_tokens * panel, 16);
        private_memory = array<float>(team * private_floats);
        panels = array<Product::Packed>(team * Product::PANEL_SIZE);
    }

    // Called by every thread of a team.
    void run(int thread) {
        float* mine = private_memory.get() + thread * private_floats;
        Product::Packed* wide = panels.get() + thread * Product::PANEL_SIZE;
        const Product::Session session;
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < plan.tiles.size(); i++) {
            if (call.x_is_float32) pack_tile<float>(plan.tiles[i]);
            else pack_tile<bfloat16>(plan.tiles[i]);
        }
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < gate_panels.size(); i++) {
            call.gate_up.with_type([&]<class W>(W) { gate<W>(gate_panels[i], wide, mine); });
        }
#pragma omp for schedule(dynamic)
        for (int64_t d = 0; d < call.width; d += panel) {
            call.down.with_type([&]<class W>(W) { down<W>(d, wide, mine); });
        }
    }

private:
    Product::Packed* hidden_of(const Tile& tile) {
        return hidden.get() + Product::packed_size(tile.column, call.inner, hidden_parts);
    }

    template <class X>
    void pack_tile(const Places& tile) {
        const X* row[Product::WIDTH];
        for (int i = 0; i < tile.count; i++)
            row[i] = static_cast<const X*>(call.x) + (first_token + plan.token[tile.first + i]) * call.stride_x;
        if (!tile.few)
            return Product::pack(row, tile, call.width, x_parts, packed.get() + Product::packed_size(tile.column, call.width, x_parts));
        for (int i = 0; i < tile.count; i++)
            for (int64_t k = 0; k < call.width; k++) few_x[(tile.column + i) * call.width + k] = to_float(row[i][k]);
    }

    template <class W>
    void gate(const GatePanel& item, Product::Packed* wide, float* c) {
        const int count = int(std::min<int64_t>(GATE_PANEL, call.inner - item.first));
        const int expert = item.tiles[0].expert;
        Row<W> row[2 * GATE_PANEL];
        for (int i = 0; i < count; i++) {
            row[i] = call.gate_up.row<W>(expert, item.first + i);
            row[count + i] = call.gate_up.row<W>(expert, call.inner + item.first + i);
        }
        if (item.tiles[0].few) return gate_few(item, row, count, c);
        Product::multiply(row, 2 * count, call.width, item.tiles, packed.get(), x_parts, GATE_PANEL * call.gate_up.stride_row, wide, c);
        const int64_t padded = round_up(2 * count, Product::ROWS);
        for (const Tile& tile : item.tiles) {
            const float* gates = c + (tile.column - item.tiles[0].column) * padded;
            const float* ups = gates + count * tile.width;
            Product::pack_channels(item.first, count, tile.width, call.inner, hidden_parts, hidden_of(tile), [&](int i, int column) {
                const int at = i * tile.width + column;
                return activate(load(gates + at), load(ups + at), call.alpha, call.limit);
            });
        }
    }

    template <class W>
    void gate_few(const GatePanel& item, const Row<W>* row, int count, float* c) {
        const Tile& tile = item.tiles[0];
        const float* x[FEW] = {};
        for (int n = 0; n < tile.count; n++) x[n] = few_x.get() + (tile.column + n) * call.width;
        few_dots(tile.count, row, 2 * count, x, call.width, c, 1, 2 * GATE_PANEL);
        for (int n = 0; n < tile.count; n++, c += 2 * GATE_PANEL) {
            float* to = few_hidden.get() + (tile.column + n) * call.inner + item.first;
            for (int i = 0; i < count; i += LANES) {
                const int part = std::min(LANES, count - i);
                store_part(to + i, activate(load_part(c + i, part), load_part(c + count + i, part), call.alpha, call.limit), part);
            }
        }
    }

    // Columns d.. of the output for every token, expert after expert.
    template <class W>
    void down(int64_t d, Product::Packed* wide, float* mine) {
        const int count = int(std::min<int64_t>(panel, call.width - d));
        float *c = mine, *total = mine + Product::PANEL * Product::TILES_AT_ONCE * Product::WIDTH;
        std::fill_n(total, num_tokens * panel, 0.0f);
        for (std::size_t n = 0; n < chunks.size(); n++) {
            const std::span<const Places> tiles = chunks[n];
            const int expert = tiles[0].expert, next = chunks[std::min(n + 1, chunks.size() - 1)][0].expert;
            Row<W> row[Product::PANEL];
            for (int i = 0; i < count; i++) row[i] = call.down.row<W>(expert, d + i);
            if (tiles[0].few) {
                down_few(tiles[0], row, count, c, total);
                continue;
            }
            Product::multiply(row, count, call.inner, tiles, hidden.get(), hidden_parts, (next - expert) * call.down.stride_expert, wide, c);
            const int64_t padded = round_up(count, Product::ROWS);
            for (const Places& tile : tiles)
                by_token(tile, c + (tile.column - tiles[0].column) * padded, count, [&](int n, int i, vfloat x, int lanes) {
                    float* to = total + plan.token[tile.first + n] * panel + i;
                    store_part(to, load_part(to, lanes) + plan.weight[tile.first + n] * x, lanes);
                });
        }
        if (call.x_is_float32) write<float>(total, d, count);
        else write<bfloat16>(total, d, count);
    }

    template <class W>
    void down_few(const Places& tile, const Row<W>* row, int count, float* c, float* total) {
        const float* h[FEW] = {};
        for (int n = 0; n < tile.count; n++) h[n] = few_hidden.get() + (tile.column + n) * call.inner;
        few_dots(tile.count, row, count, h, call.inner, c, 1, Product::PANEL);
        for (int n = 0; n < tile.count; n++) {
            float* to = total + plan.token[tile.first + n] * panel;
            const float weight = plan.weight[tile.first + n];
            for (int i = 0; i < count; i++) to[i] += weight * c[n * Product::PANEL + i];
        }
    }

    template <class X>
    void write(const float* total, int64_t d, int count) {
        for (int64_t t = 0; t < num_tokens; t++, total += panel) {
            X* to = static_cast<X*>(call.out) + (first_token + t) * call.width + d;
            for (int i = 0; i < count; i += LANES) store_part(to + i, load(total + i), std::min(LANES, count - i));
        }
    }

    const Call& call;
    const int64_t first_token, num_tokens;
    const Plan plan;
    // Hidden channels are not rounded to x's dtype: two parts hold them to far less than the rounding of what comes out.
    const int x_parts, hidden_parts;
    const Array<Product::Packed> packed, hidden;
    const Floats few_x, few_hidden;
    std::vector<std::span<const Places>> chunks;
    std::vector<GatePanel> gate_panels;
    int64_t panel, private_floats;
    Floats private_memory;
    Array<Product::Packed> panels;
};

void run_experts(const Call& call) {
    const int64_t most = FLOATS_AT_ONCE / std::max<int64_t>(1, call.num_active * (call.width + call.inner));
    const int64_t step = std::clamp<int64_t>(most, Product::WIDTH, TOKENS_AT_ONCE);
    for (int64_t first = 0; first < call.tokens; first += step) {
        const int64_t count = std::min(step, call.tokens - first);
        const int team = count * call.num_active * call.width * call.inner * 3 < SERIAL ? 1 : call.threads;
        Step one(call, first, count, team);
#pragma omp parallel num_threads(team) if (team > 1)
        one.run(omp_get_thread_num());
    }
}

// ---- routing

// The router's order as integers: larger numbers first, NaN before all of them, no difference between the zeros.
vint order_of(vfloat x) {
    const vint bits = (vint)(x + 0.0f);
    return x == x ? bits ^ ((bits >> 31) & 0x7fffffff) : splat(0x7fffffff);
}

struct Routing {
    const float* bias;
    int num_experts, num_active;
    std::int32_t* expert;
    float* weight;

    // Chooses the experts of `count` tokens from their logits [E][width]; order holds [E][LANES].
    void choose(float* logit, int count, int width, int64_t token, float* order) const {
        for (int first = 0; first < count; first += LANES, logit += LANES) {
            const int tokens = std::min(LANES, count - first);
            for (int e = 0; e < num_experts; e++) {
                const vfloat score = sigmoid(load(logit + e * width));
                store(logit + e * width, score);
                store(order + e * LANES, (vfloat)order_of(score + bias[e]));
            }
            for (int a = 0; a < num_active; a++) {
                const vint chosen = best(order);
                for (int n = 0; n < tokens; n++) {
                    const int64_t to = (token + first + n) * num_active + a;
                    expert[to] = chosen[n];
                    weight[to] = logit[chosen[n] * width + n];
                }
            }
            for (int n = 0; n < tokens; n++) normalise(weight + (token + first + n) * num_active);
        }
    }

    // The first of the largest numbers of each lane, which are then taken out.
    vint best(float* order) const {
        const vint taken = splat(std::numeric_limits<std::int32_t>::min());
        vint most = taken, chosen{};
        for (int e = 0; e < num_experts; e++) {
            const vint key = (vint)load(order + e * LANES);
            chosen = key > most ? splat(e) : chosen;
            most = max(key, most);
        }
        for (int e = 0; e < num_experts; e++) {
            const vint key = (vint)load(order + e * LANES);
            store(order + e * LANES, (vfloat)(chosen == e ? taken : key));
        }
        return chosen;
    }

    void normalise(float* w) const {
        float total = 0.0f;
        for (int a = 0; a < num_active; a++) total += w[a];
        for (int a = 0; a < num_active; a++) w[a] /= total;
    }
};

// A few tokens take dot products, shared out by rows; more are shared out by tiles.
template <class X>
void run_route(const Routing& routing, const X* x, int64_t stride_x, int64_t num_tokens, const Row<float>* rows, int64_t depth, int threads) {
    if (num_tokens == 0) return;
    const int num_experts = routing.num_experts;
    const int team = num_tokens * num_experts * depth < SERIAL ? 1 : threads;
    const int64_t logits = round_up(num_experts, Fma::ROWS) * Fma::WIDTH;
    if (num_tokens <= FEW) {
        const Floats memory = array<float>(logits + num_experts * LANES);
        std::fill_n(memory.get(), num_experts * LANES, 0.0f);
        const X* row[FEW] = {};
        for (int64_t i = 0; i < num_tokens; i++) row[i] = x + i * stride_x;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
        for (int e = 0; e < num_experts; e += Fma::ROWS)
            few_dots(int(num_tokens), rows + e, std::min(Fma::ROWS, num_experts - e), row, depth, memory.get() + e * LANES, LANES, 1);
        routing.choose(memory.get(), int(num_tokens), LANES, 0, memory.get() + logits);
        return;
    }
    const int64_t private_floats = round_up(depth * Fma::WIDTH + logits + num_experts * LANES, 16);
    const Floats private_memory = array<float>(team * private_floats);
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
    for (int64_t first = 0; first < num_tokens; first += Fma::WIDTH) {
        float* packed = private_memory.get() + omp_get_thread_num() * private_floats;
        float* logit = packed + depth * Fma::WIDTH;
        const int count = int(std::min<int64_t>(Fma::WIDTH, num_tokens - first));
        const Tile tile{count, int(round_up(count, LANES)), 0};
        const X* row[Fma::WIDTH];
        for (int i = 0; i < count; i++) row[i] = x + (first + i) * stride_x;
        Fma::pack(row, tile, depth, 1, packed);
        for (int e = 0; e < num_experts; e += Fma::PANEL)
            Fma::multiply(rows + e, std::min(Fma::PANEL, num_experts - e), depth, std::span(&tile, 1), packed, 1, 0, nullptr, logit + e * tile.width);
        routing.choose(logit, count, tile.width, first, logit + logits);
    }
}

// ---- Python

template <class F>
void with_type(const Tensor& x, const char* name, F run) {
    if (is_float32(x)) run(float{});
    else if (is_bfloat16(x)) run(bfloat16{});
    else throw std::invalid_argument(std::string(name) + " must be float32 or bfloat16");
}

Weights weights_of(const Tensor& x, const std::optional<Tensor>& scale, const char* name) {
    expect(x, name, 3);
    const int64_t depth = x.shape(2);
    Weights weights{x.data(), x.stride(0), x.stride(1), is_float32(x), nullptr, 0, 0, std::max<int64_t>(depth, 1)};
    if (!scale) {
        with_type(x, name, [](auto) {});
        return weights;
    }
    expect(*scale, "scales", 3);
    data_of<const std::int8_t>(x, name);
    const int64_t groups = scale->shape(2);
    if (scale->shape(0) != x.shape(0) || scale->shape(1) != x.shape(1) || groups < 1 || depth % groups ||
        (groups > 1 && depth / groups % 16))
        throw std::invalid_argument(std::string(name) + ": scales must be of whole rows or of groups of 16 n inputs");
    weights.scale = data_of<const float>(*scale, "scales");
    weights.scale_expert = scale->stride(0), weights.scale_row = scale->stride(1);
    weights.group = std::max<int64_t>(depth / groups, 1);
    return weights;
}

}  // namespace

void swiglu(const Tensor& gate_up, float alpha, float limit, const Tensor& out, int threads) {
    expect(gate_up, "gate_up", 2);
    expect_dense(out, "out", 2);
    const int64_t rows = out.shape(0), inner = out.shape(1);
    if (gate_up.shape(0) != out.shape(0) || gate_up.shape(1) != 2 * out.shape(1))
        throw std::invalid_argument("gate_up must be [R, 2F] and out [R, F]");
    const int team = rows * inner < SERIAL_ACTIVATIONS ? 1 : threads;
    with_type(gate_up, "gate_up", [&]<class T>(T) {
        const T* from = data_of<const T>(gate_up, "gate_up");
        T* to = data_of<T>(out, "out");
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
        for (int64_t r = 0; r < rows; r++) {
            const T *gate = from + r * gate_up.stride(0), *up = gate + inner;
            for (int64_t i = 0; i < inner; i += LANES) {
                const int64_t part = std::min<int64_t>(LANES, inner - i);
                store_part(to + r * inner + i, activate(load_part(gate + i, part), load_part(up + i, part), alpha, limit), part);
            }
        }
    });
}

void route(const Tensor& x, const Tensor& router, const Tensor& bias, const Tensor& expert, const Tensor& weight, int threads) {
    expect(x, "x_TD", 2);
    expect(router, "router_ED", 2);
    expect_dense(bias, "bias_E", 1);
    expect_dense(expert, "expert_TA", 2);
    expect_dense(weight, "weight_TA", 2);
    const int num_experts = int(router.shape(0)), num_active = int(expert.shape(1));
    if (x.shape(1) != router.shape(1) || bias.shape(0) != router.shape(0) || expert.shape(0) != x.shape(0) ||
        weight.shape(0) != expert.shape(0) || weight.shape(1) != expert.shape(1) || num_active < 1 || num_active > num_experts)
        throw std::invalid_argument("router_ED, bias_E, expert_TA and weight_TA must be of x's width and tokens");
    const float* first_row = data_of<const float>(router, "router_ED");
    std::vector<Row<float>> rows;
    for (int e = 0; e < num_experts; e++) rows.push_back({first_row + e * router.stride(0), nullptr, int64_t(router.shape(1))});
    const Routing routing{data_of<const float>(bias, "bias_E"), num_experts, num_active,
                          data_of<std::int32_t>(expert, "expert_TA"), data_of<float>(weight, "weight_TA")};
    with_type(x, "x_TD", [&]<class X>(X) {
        run_route(routing, data_of<const X>(x, "x_TD"), x.stride(0), std::int64_t(x.shape(0)), rows.data(),
                  std::int64_t(x.shape(1)), threads);
    });
}

void experts(const Tensor& x, const Tensor& expert, const Tensor& weight, const Tensor& gate_up,
             const std::optional<Tensor>& gate_up_scale, const Tensor& down, const std::optional<Tensor>& down_scale, float alpha,
             float limit, const Tensor& out, int threads) {
    expect(x, "x_TD", 2);
    expect_dense(expert, "expert_TA", 2);
    expect_dense(weight, "weight_TA", 2);
    expect_dense(out, "out_TD", 2);
    const Weights gates = weights_of(gate_up, gate_up_scale, "gate_up_E2FD"), downs = weights_of(down, down_scale, "down_EDF");
    Call call{int64_t(x.shape(0)), int64_t(x.shape(1)), int64_t(down.shape(2)), int(down.shape(0)), int(expert.shape(1)), threads,
              alpha, limit, x.data(), is_float32(x), x.stride(0), data_of<const std::int32_t>(expert, "expert_TA"),
              data_of<const float>(weight, "weight_TA"), gates, downs, nullptr};
    if (down.shape(1) != x.shape(1) || gate_up.shape(0) != down.shape(0) || gate_up.shape(1) != 2 * down.shape(2) ||
        gate_up.shape(2) != x.shape(1))
        throw std::invalid_argument("gate_up_E2FD and down_EDF must be of the same experts and of x's width");
    if (expert.shape(0) != x.shape(0) || weight.shape(0) != x.shape(0) || weight.shape(1) != expert.shape(1) ||
        out.shape(0) != x.shape(0) || out.shape(1) != x.shape(1))
        throw std::invalid_argument("expert_TA, weight_TA and out_TD must be of x's tokens");
    for (int64_t i = 0; i < call.tokens * call.num_active; i++)
        if (call.expert[i] < 0 || call.expert[i] >= call.num_experts)
            throw std::invalid_argument("expert " + std::to_string(call.expert[i]) + " is not one of the " +
                                        std::to_string(call.num_experts));
    with_type(x, "x_TD", [&]<class X>(X) { call.out = data_of<X>(out, "out_TD"); });
    run_experts(call);
}

void bind_experts(nb::module_& m) {
    m.def("swiglu", &swiglu, nb::arg("gate_up"), nb::arg("alpha"), nb::arg("limit"), nb::arg("out"), nb::arg("threads"),
          nb::call_guard<nb::gil_scoped_release>(), "Fill out [R, F] with the activation of gate_up [R, 2F].");
    m.def("route", &route, nb::arg("x_TD"), nb::arg("router_ED"), nb::arg("bias_E"), nb::arg("expert_TA"), nb::arg("weight_TA"),
          nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(), "Fill expert_TA and weight_TA with each token's choice.");
    m.def("experts", &experts, nb::arg("x_TD"), nb::arg("expert_TA"), nb::arg("weight_TA"), nb::arg("gate_up_E2FD"),
          nb::arg("gate_up_scale").none(), nb::arg("down_EDF"), nb::arg("down_scale").none(), nb::arg("alpha"), nb::arg("limit"), nb::arg("out_TD"), nb::arg("threads"),
          nb::call_guard<nb::gil_scoped_release>(), "Fill out_TD with the weighted sum of each token's experts.");
}

}  // namespace openm3
