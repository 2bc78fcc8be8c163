// Routed experts, routing and the clamped SwiGLU, in float32 whatever the weights are stored as.
//
// Tokens are sorted by expert. An expert with many of them takes them in tiles: packed so that a vector holds one channel
// of LANES tokens, they meet the weights row by row, each weight broadcast from where it lies, and a tile of ROWS rows by
// three vectors stays in registers. Its output is laid out as the next product's input. An expert with a few tokens takes
// dot products instead, bound by reading the weights once. Which of the two, and every order of summation, depend on the
// tokens of an expert alone: the result is the same for every number of threads.
#include <nanobind/stl/optional.h>
#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "experts/experts.h"
#include "native/simd.h"
#include "native/tensors.h"

namespace openm3 {
namespace {

using std::int64_t;

constexpr int ROWS = REGISTERS == 32 ? 8 : 4;
constexpr int VECTORS = 3;
constexpr int WIDTH = VECTORS * LANES;
// As many tokens of an expert, or fewer, are multiplied as dot products.
constexpr int FEW = 4;
// Products that are added one after the other: longer sums are made of several, for the rounding's sake.
constexpr int LONGEST_SUM = 256;
// Channels multiplied at a time: those of a tile, and of a panel of weights, stay in the second-level cache.
constexpr int DEPTH = 1024;
// Tiles multiplied with a panel of weights at a time: their products stay in the second-level cache.
constexpr int TILES_AT_ONCE = 8;
constexpr int GATE_PANEL = 32;
constexpr int LARGEST_PANEL = 64;
constexpr int PANEL_ROWS = std::max(2 * GATE_PANEL, LARGEST_PANEL);
// Products below which a second thread costs more than it saves.
constexpr int64_t SERIAL = 1 << 18;
constexpr int64_t SERIAL_ACTIVATIONS = 1 << 14;
// Packed tokens and hidden channels held at a time.
constexpr int64_t FLOATS_AT_ONCE = 1 << 26;
constexpr int64_t TOKENS_AT_ONCE = 2048;

constexpr int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Uninitialised floats on a cache line's border.
struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(int64_t count) { return Floats(new (std::align_val_t(64)) float[std::size_t(count)]); }

// ---- vectors

using openm3::load;
using openm3::to_float;

float to_float(std::int8_t x) { return x; }

vfloat load(const std::int8_t* p) {
    typedef std::int8_t vbyte __attribute__((vector_size(LANES)));
    vbyte x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, vint), vfloat);
}

// The first `count` lanes from memory, zero in the others.
template <class T>
vfloat load_part(const T* p, int64_t count) {
    float x[LANES] = {};
    for (int64_t i = 0; i < count; i++) x[i] = to_float(p[i]);
    return load(x);
}

template <class Pick, std::size_t... I>
vfloat pick(vfloat a, vfloat b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, Pick::lane(int(I))...);
}

// Lanes of a (0..LANES) and b (LANES..2 LANES), those that Pick::lane names.
template <class Pick>
vfloat pick(vfloat a, vfloat b) {
    return pick<Pick>(a, b, std::make_index_sequence<LANES>{});
}

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

// What row i of a transposition takes from itself and from row i + S (or, High, what row i + S takes).
template <int S, bool High>
struct Swap {
    static constexpr int lane(int i) { return High ? (i & S ? LANES + i : i + S) : (i & S ? LANES + i - S : i); }
};

template <int S = LANES / 2>
void transpose(vfloat (&x)[LANES]) {
    if constexpr (S > 0) {
        for (int i = 0; i < LANES; i++) {
            if (i & S) continue;
            const vfloat a = x[i], b = x[i + S];
            x[i] = pick<Swap<S, false>>(a, b);
            x[i + S] = pick<Swap<S, true>>(a, b);
        }
        transpose<S / 2>(x);
    }
}

vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }

vfloat activate(vfloat gate, vfloat up, float alpha, float limit) {
    gate = gate > limit ? splat(limit) : gate;
    up = up > limit ? splat(limit) : up;
    up = up < -limit ? splat(-limit) : up;
    return (up + 1.0f) * gate / (1.0f + exp(gate * -alpha));
}

// ---- products

// A weight row: numbers as they are stored, times a scale for each `group` neighbours if they are int8 codes. A group is
// a multiple of 16, or the whole row; rows without scales are one group.
template <class W>
struct Row {
    static constexpr bool coded = std::is_same_v<W, std::int8_t>;

    const W* data;
    const float* scale;
    int64_t group;

    // Some numbers in float32.
    void widen(int64_t first, int64_t count, float* to) const {
        for (int64_t i = 0; i < count;) {
            const int64_t g = (first + i) / group, end = std::min((g + 1) * group - first, count);
            const float by = coded ? scale[g] : 1.0f;
            const W* from = data + first;
            for (; i + LANES <= end; i += LANES) store(to + i, coded ? load(from + i) * by : load(from + i));
            for (; i < end; i++) to[i] = coded ? to_float(from[i]) * by : to_float(from[i]);
        }
    }
};

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
        const bool far = depth * int64_t(sizeof(W)) >= 2048;
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

// Weights that are wanted soon: `bytes` for every LANES channels of each of ROWS rows are fetched while others are used.
struct Ahead {
    const char* row[ROWS];
    int64_t bytes;

    void fetch(int64_t k) const {
        for (int i = 0; i < ROWS; i++) __builtin_prefetch(row[i] + k / LANES * bytes, 0, 2);
    }
};

// c[i][token] (+)= rows[i] . x for ROWS rows and a tile of V vectors of tokens; x holds [depth][V * LANES].
template <int V>
void multiply(const float* const* rows, const float* x, int64_t depth, float* c, bool add, const Ahead* ahead) {
    const float* row[ROWS];
    for (int i = 0; i < ROWS; i++) row[i] = rows[i];
    for (int64_t k = 0; k < depth; add = true) {
        const int64_t end = std::min<int64_t>(k + LONGEST_SUM, depth);
        vfloat total[ROWS][V] = {};
        while (k < end) {
            if (ahead) ahead->fetch(k);
            for (const int64_t stop = std::min(k + LANES, end); k < stop; k++) {
                vfloat token[V];
                for (int v = 0; v < V; v++) token[v] = load(x + (k * V + v) * LANES);
                for (int i = 0; i < ROWS; i++) {
                    const float weight = row[i][k];
                    for (int v = 0; v < V; v++) total[i][v] += weight * token[v];
                }
            }
        }
        for (int i = 0; i < ROWS; i++)
            for (int v = 0; v < V; v++) {
                float* to = c + (i * V + v) * LANES;
                store(to, add ? load(to) + total[i][v] : total[i][v]);
            }
    }
}

// Tokens of one expert that are multiplied together: `count` places of the sorted order from `first` on. They start at
// `column` of the packed buffers and take `width` columns there, in vectors; a few are rows instead, and width is count.
struct Tile {
    int expert;
    bool few;
    int count, width;
    int64_t first, column;
};

// Products of weight rows with packed tiles: c holds, tile after tile, [num_rows rounded up to ROWS][width].
template <class W>
void multiply(const Row<W>* rows, int num_rows, int64_t depth, std::span<const Tile> tiles, const float* packed, float* wide, float* c) {
    const int padded = int(round_up(num_rows, ROWS));
    const float* from[PANEL_ROWS + ROWS];
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t span = std::min<int64_t>(DEPTH, depth - k);
        for (const Tile& tile : tiles) {
            const bool first = &tile == tiles.data();
            const float* x = packed + tile.column * depth + k * tile.width;
            float* to = c + (tile.column - tiles[0].column) * padded;
            for (int i = 0; i < padded; i += ROWS, to += ROWS * tile.width) {
                Ahead ahead{{}, int64_t(LANES * sizeof(W))};
                for (int j = i; first && j < i + ROWS; j++) {
                    const Row<W>& row = rows[std::min(j, num_rows - 1)];
                    if constexpr (!std::is_same_v<W, float>) row.widen(k, span, wide + j * DEPTH);
                    from[j] = std::is_same_v<W, float> ? reinterpret_cast<const float*>(row.data) + k : wide + j * DEPTH;
                    const bool last = j + ROWS >= padded;
                    const W* next = rows[std::min(last ? j % ROWS : j + ROWS, num_rows - 1)].data;
                    ahead.row[j - i] = reinterpret_cast<const char*>(next + k + (last ? span : 0));
                }
                const Ahead* soon = first ? &ahead : nullptr;
                if (tile.width == LANES) multiply<1>(from + i, x, span, to, k > 0, soon);
                else if (tile.width == 2 * LANES) multiply<2>(from + i, x, span, to, k > 0, soon);
                else multiply<3>(from + i, x, span, to, k > 0, soon);
            }
        }
    }
}

// Packs rows of x as [depth][width]; columns after the last row repeat it.
template <class X>
void pack(const X* const* rows, int count, int width, int64_t depth, float* to) {
    for (int first = 0; first < width; first += LANES) {
        const X* row[LANES];
        for (int i = 0; i < LANES; i++) row[i] = rows[std::min(first + i, count - 1)];
        int64_t k = 0;
        for (; k + LANES <= depth; k += LANES) {
            vfloat x[LANES];
            for (int i = 0; i < LANES; i++) x[i] = load(row[i] + k);
            transpose(x);
            for (int i = 0; i < LANES; i++) store(to + (k + i) * width + first, x[i]);
        }
        for (; k < depth; k++)
            for (int i = 0; i < LANES; i++) to[k * width + first + i] = to_float(row[i][k]);
    }
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

// Places of a step's (token, expert) pairs sorted by expert, earlier tokens first, cut into tiles.
struct Plan {
    std::vector<std::int32_t> token;
    std::vector<float> weight;
    std::vector<Tile> tiles;
    int64_t columns = 0;

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
            const int count = int(std::min<int64_t>(end - first, WIDTH));
            const int width = few ? count : int(round_up(count, LANES));
            if (!few) columns = round_up(columns, LANES);
            tiles.push_back({expert, few, count, width, first, columns});
            first += count, columns += width;
        }
    }
};

// A panel of an expert's gate and up rows and the tiles that it multiplies.
struct GatePanel {
    int64_t first;
    std::span<const Tile> tiles;
};

// One step of a block of tokens: pack, multiply and activate, multiply back, each shared out over the threads.
class Step {
public:
    Step(const Call& call, int64_t first_token, int64_t num_tokens, int team)
        : call(call), first_token(first_token), num_tokens(num_tokens), plan(call, first_token, num_tokens),
          packed(floats(plan.columns * call.width)), hidden(floats(plan.columns * call.inner)) {
        panel = LARGEST_PANEL;
        while (panel > 16 && call.width < 4 * team * panel) panel /= 2;
        for (std::size_t i = 0, end; i < plan.tiles.size(); i = end) {
            for (end = i; end < plan.tiles.size() && end < i + TILES_AT_ONCE && plan.tiles[end].expert == plan.tiles[i].expert;) end++;
            chunks.push_back({plan.tiles.data() + i, end - i});
            for (int64_t f = 0; f < call.inner; f += GATE_PANEL) gate_panels.push_back({f, chunks.back()});
        }
        private_floats = PANEL_ROWS * DEPTH + (PANEL_ROWS + ROWS) * TILES_AT_ONCE * WIDTH + round_up(num_tokens * panel, 16);
        private_memory = floats(team * private_floats);
    }

    // Called by every thread of a team.
    void run(int thread) {
        float* mine = private_memory.get() + thread * private_floats;
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < plan.tiles.size(); i++) {
            if (call.x_is_float32) pack_tile<float>(plan.tiles[i]);
            else pack_tile<bfloat16>(plan.tiles[i]);
        }
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < gate_panels.size(); i++) {
            call.gate_up.with_type([&]<class W>(W) { gate<W>(gate_panels[i], mine); });
        }
#pragma omp for schedule(dynamic)
        for (int64_t d = 0; d < call.width; d += panel) {
            call.down.with_type([&]<class W>(W) { down<W>(d, mine); });
        }
    }

private:
    template <class X>
    void pack_tile(const Tile& tile) {
        const X* row[WIDTH];
        for (int i = 0; i < tile.count; i++)
            row[i] = static_cast<const X*>(call.x) + (first_token + plan.token[tile.first + i]) * call.stride_x;
        float* to = packed.get() + tile.column * call.width;
        if (!tile.few) return pack(row, tile.count, tile.width, call.width, to);
        for (int i = 0; i < tile.count; i++)
            for (int64_t k = 0; k < call.width; k++) to[i * call.width + k] = to_float(row[i][k]);
    }

    template <class W>
    void gate(const GatePanel& item, float* mine) {
        const int count = int(std::min<int64_t>(GATE_PANEL, call.inner - item.first));
        const int expert = item.tiles[0].expert;
        Row<W> row[2 * GATE_PANEL];
        for (int i = 0; i < count; i++) {
            row[i] = call.gate_up.row<W>(expert, item.first + i);
            row[count + i] = call.gate_up.row<W>(expert, call.inner + item.first + i);
        }
        float *wide = mine, *c = mine + PANEL_ROWS * DEPTH;
        if (item.tiles[0].few) return gate_few(item, row, count, c);
        multiply(row, 2 * count, call.width, item.tiles, packed.get(), wide, c);
        const int64_t padded = round_up(2 * count, ROWS);
        for (const Tile& tile : item.tiles) {
            float* to = hidden.get() + tile.column * call.inner + item.first * tile.width;
            const float* gates = c + (tile.column - item.tiles[0].column) * padded;
            const float* ups = gates + count * tile.width;
            for (int i = 0; i < count * tile.width; i += LANES)
                store(to + i, activate(load(gates + i), load(ups + i), call.alpha, call.limit));
        }
    }

    template <class W>
    void gate_few(const GatePanel& item, const Row<W>* row, int count, float* c) {
        const Tile& tile = item.tiles[0];
        const float* x[FEW] = {};
        for (int n = 0; n < tile.count; n++) x[n] = packed.get() + tile.column * call.width + n * call.width;
        few_dots(tile.count, row, 2 * count, x, call.width, c, 1, 2 * GATE_PANEL);
        for (int n = 0; n < tile.count; n++, c += 2 * GATE_PANEL) {
            float* to = hidden.get() + tile.column * call.inner + n * call.inner + item.first;
            for (int i = 0; i < count; i += LANES) {
                const int part = std::min(LANES, count - i);
                float h[LANES];
                store(h, activate(load_part(c + i, part), load_part(c + count + i, part), call.alpha, call.limit));
                for (int j = 0; j < part; j++) to[i + j] = h[j];
            }
        }
    }

    // Columns d.. of the output for every token, expert after expert.
    template <class W>
    void down(int64_t d, float* mine) {
        const int count = int(std::min<int64_t>(panel, call.width - d));
        float *wide = mine, *c = wide + PANEL_ROWS * DEPTH;
        float* total = c + (PANEL_ROWS + ROWS) * TILES_AT_ONCE * WIDTH;
        std::fill_n(total, num_tokens * panel, 0.0f);
        for (const auto& tiles : chunks) {
            Row<W> row[LARGEST_PANEL];
            for (int i = 0; i < count; i++) row[i] = call.down.row<W>(tiles[0].expert, d + i);
            if (tiles[0].few) {
                down_few(tiles[0], row, count, c, total);
                continue;
            }
            multiply(row, count, call.inner, tiles, hidden.get(), wide, c);
            const int64_t padded = round_up(count, ROWS);
            for (const Tile& tile : tiles) add(tile, c + (tile.column - tiles[0].column) * padded, count, total);
        }
        if (call.x_is_float32) write<float>(total, d, count);
        else write<bfloat16>(total, d, count);
    }

    template <class W>
    void down_few(const Tile& tile, const Row<W>* row, int count, float* c, float* total) {
        const float* h[FEW] = {};
        for (int n = 0; n < tile.count; n++) h[n] = hidden.get() + tile.column * call.inner + n * call.inner;
        few_dots(tile.count, row, count, h, call.inner, c, 1, LARGEST_PANEL);
        for (int n = 0; n < tile.count; n++) {
            float* to = total + plan.token[tile.first + n] * panel;
            const float weight = plan.weight[tile.first + n];
            for (int i = 0; i < count; i++) to[i] += weight * c[n * LARGEST_PANEL + i];
        }
    }

    // total[token] += weight * products of its tile, which stand in columns.
    void add(const Tile& tile, const float* c, int count, float* total) {
        for (int first = 0; first < tile.count; first += LANES) {
            const int tokens = std::min(LANES, tile.count - first);
            int i = 0;
            for (; i + LANES <= count; i += LANES) {
                vfloat x[LANES];
                for (int j = 0; j < LANES; j++) x[j] = load(c + (i + j) * tile.width + first);
                transpose(x);
                for (int n = 0; n < tokens; n++) {
                    float* to = total + plan.token[tile.first + first + n] * panel + i;
                    store(to, load(to) + plan.weight[tile.first + first + n] * x[n]);
                }
            }
            for (; i < count; i++)
                for (int n = 0; n < tokens; n++)
                    total[plan.token[tile.first + first + n] * panel + i] +=
                        plan.weight[tile.first + first + n] * c[i * tile.width + first + n];
        }
    }

    template <class X>
    void write(const float* total, int64_t d, int count) {
        for (int64_t t = 0; t < num_tokens; t++, total += panel) {
            X* to = static_cast<X*>(call.out) + (first_token + t) * call.width + d;
            int i = 0;
            for (; i + LANES <= count; i += LANES) store(to + i, load(total + i));
            for (; i < count; i++) to[i] = from_float<X>(total[i]);
        }
    }

    const Call& call;
    const int64_t first_token, num_tokens;
    const Plan plan;
    const Floats packed, hidden;
    std::vector<std::span<const Tile>> chunks;
    std::vector<GatePanel> gate_panels;
    int64_t panel, private_floats;
    Floats private_memory;
};

void run_experts(const Call& call) {
    const int64_t most = FLOATS_AT_ONCE / std::max<int64_t>(1, call.num_active * (call.width + call.inner));
    const int64_t step = std::clamp<int64_t>(most, WIDTH, TOKENS_AT_ONCE);
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
    const int64_t logits = round_up(num_experts, ROWS) * WIDTH;
    if (num_tokens <= FEW) {
        const Floats memory = floats(logits + num_experts * LANES);
        std::fill_n(memory.get(), num_experts * LANES, 0.0f);
        const X* row[FEW] = {};
        for (int64_t i = 0; i < num_tokens; i++) row[i] = x + i * stride_x;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
        for (int e = 0; e < num_experts; e += ROWS)
            few_dots(int(num_tokens), rows + e, std::min(ROWS, num_experts - e), row, depth, memory.get() + e * LANES, LANES, 1);
        routing.choose(memory.get(), int(num_tokens), LANES, 0, memory.get() + logits);
        return;
    }
    const int64_t private_floats = round_up(depth * WIDTH + logits + num_experts * LANES, 16);
    const Floats private_memory = floats(team * private_floats);
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
    for (int64_t first = 0; first < num_tokens; first += WIDTH) {
        float* packed = private_memory.get() + omp_get_thread_num() * private_floats;
        float* logit = packed + depth * WIDTH;
        const int count = int(std::min<int64_t>(WIDTH, num_tokens - first));
        const Tile tile{0, false, count, int(round_up(count, LANES)), first, 0};
        const X* row[WIDTH];
        for (int i = 0; i < count; i++) row[i] = x + (first + i) * stride_x;
        pack(row, count, tile.width, depth, packed);
        for (int e = 0; e < num_experts; e += PANEL_ROWS)
            multiply(rows + e, std::min(PANEL_ROWS, num_experts - e), depth, {&tile, 1}, packed, nullptr, logit + e * tile.width);
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
            int64_t i = 0;
            for (; i + LANES <= inner; i += LANES)
                store(to + r * inner + i, activate(load(gate + i), load(up + i), alpha, limit));
            if (i == inner) continue;
            float rest[LANES];
            store(rest, activate(load_part(gate + i, inner - i), load_part(up + i, inner - i), alpha, limit));
            for (int64_t j = i; j < inner; j++) to[r * inner + j] = from_float<T>(rest[j - i]);
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
