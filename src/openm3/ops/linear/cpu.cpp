// x @ weight^T, the weight read as it is stored and products summed in float32.
//
// Up to FEW tokens multiply rows as they are stored: one pass, as fast as memory gives them. Up to SOME share a panel of rows
// that is widened to float32 in the first-level cache. In both, every output is summed over LANES partial sums, in an order
// that depends on nothing but the width: a token's result is the same bits alone and among others. More tokens are packed
// (native/product.h), and then a token's result is the same among any number of more than SOME.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <algorithm>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "linear/linear.h"
#include "native/matrix.h"
#include "native/product.h"
#include "native/simd.h"

namespace openm3 {
namespace {

constexpr int FEW = 4;
// By the types of weights and tokens: as many are multiplied before the parts of a widened weight are made as fast.
template <class E, class T>
constexpr int SOME = std::is_same_v<Product, Fma>    ? 32
                     : std::is_same_v<E, bfloat16> ? FEW
                     : std::is_same_v<T, float>    ? 16
                                                   : 8;
constexpr int PANEL_ROWS = 8;
constexpr int PANEL_COLUMNS = 512;
// Packed tokens held at a time.
constexpr std::int64_t TOKENS_AT_ONCE = 2048;
// Fewer products than this take no longer than waking another thread.
constexpr std::int64_t WORTH_A_THREAD = 1 << 17;

// ---- dot products

// Rows of a weight: float32 or bfloat16 values, or int8 codes of which every `group` neighbours share a scale. A group is
// a multiple of LANES, or the whole row.
template <class E>
struct Rows {
    static constexpr bool coded = std::is_same_v<E, std::int8_t>;

    const E* data;
    std::int64_t stride, count, width;
    const float* scale = nullptr;
    std::int64_t scale_stride = 0, group = 0;

    const E* row(std::int64_t r) const { return data + r * stride; }
    const float* scales(std::int64_t r) const { return scale + r * scale_stride; }
};

// Rows that one pass holds in registers beside C tokens.
constexpr int rows_for(int tokens) { return REGISTERS >= 32 ? (tokens == 1 ? 8 : 16 / tokens) : 8 / tokens; }

// Adds to acc[c * R + r] the products of row first + r (the last one, if there are fewer) and x[c], which is padded with
// zeros to whole vectors. Where rows come from memory, those of the next call are asked for on the way: processors do not foresee
// how R short rows are read side by side.
template <int R, int C, bool FromMemory, class E>
inline void multiply_rows(const Rows<E>& w, std::int64_t first, const float* const (&x)[C], vfloat (&acc)[R * C]) {
    constexpr std::int64_t LINE = 64 / sizeof(E);
    const E* row[R];
    const float* scale[R];
    vfloat by[R];
    for (int r = 0; r < R; r++) {
        const std::int64_t index = std::min(first + r, w.count - 1);
        row[r] = w.row(index);
        if constexpr (Rows<E>::coded) scale[r] = w.scales(index);
    }
    const std::int64_t group = Rows<E>::coded ? w.group : w.width;
    for (std::int64_t i = 0, g = 0; i < w.width; g++) {
        const std::int64_t end = std::min(i + group, w.width);
        if constexpr (Rows<E>::coded)
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) by[r] = splat(scale[r][g]);
        for (; i + LANES <= end; i += LANES) {
            if (FromMemory && i % LINE == 0)
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) __builtin_prefetch(row[r] + i + R * w.stride);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                vfloat weight = load(row[r] + i);
                if constexpr (Rows<E>::coded) weight *= by[r];
#pragma GCC unroll 16
                for (int c = 0; c < C; c++) acc[c * R + r] += weight * load(x[c] + i);
            }
        }
        if (i < end) {
            for (int r = 0; r < R; r++) {
                vfloat weight = load_part(row[r] + i, end - i);
                if constexpr (Rows<E>::coded) weight *= by[r];
                for (int c = 0; c < C; c++) acc[c * R + r] += weight * load(x[c] + i);
            }
            i = end;
        }
    }
}

template <int Start, int... I>
inline vfloat every_second(vfloat a, vfloat b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I + Start)...);
}

inline vfloat add_pairs(vfloat a, vfloat b) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>();
    return every_second<0>(a, b, lanes) + every_second<1>(a, b, lanes);
}

// The sums of N vectors, N a power of two: total[n] is that of acc[n], neighbouring lanes added first.
template <int N>
inline void sum_each(const vfloat (&acc)[N], float (&total)[N]) {
    constexpr int M = N < LANES ? N : LANES;
#pragma GCC unroll 16
    for (int k = 0; k < N; k += M) {
        vfloat part[M];
        for (int n = 0; n < M; n++) part[n] = acc[k + n];
        int count = M;
#pragma GCC unroll 4
        for (int width = 1; width < LANES; width *= 2) {
            if (count == 1) {
                part[0] = add_pairs(part[0], part[0]);
                continue;
            }
            count /= 2;
#pragma GCC unroll 16
            for (int n = 0; n < count; n++) part[n] = add_pairs(part[2 * n], part[2 * n + 1]);
        }
        std::memcpy(total + k, part, M * sizeof(float));
    }
}

// ---- tokens and panels

// Some tokens in float32, zeros behind each up to whole vectors.
struct Tokens {
    std::int64_t count, stride;
    Array<float> value;

    template <class T>
    Tokens(const T* x, std::int64_t step, std::int64_t count, std::int64_t width)
        : count(count), stride(round_up(width, LANES)), value(array<float>(count * stride)) {
        std::fill_n(value.get(), count * stride, 0.0f);
        for (std::int64_t t = 0; t < count; t++)
            for (std::int64_t i = 0; i < width; i++) value[t * stride + i] = to_float(x[t * step + i]);
    }

    // C tokens from `first` on, from a column on; the last one again where there are no more.
    template <int C>
    void at(std::int64_t first, std::int64_t column, const float* (&x)[C]) const {
        for (int c = 0; c < C; c++) x[c] = value.get() + std::min(first + c, count - 1) * stride + column;
    }
};

// Writes the sums of R rows and C tokens that are inside `out`, which is [tokens, rows].
template <int R, int C, class T>
void put(const vfloat (&acc)[R * C], T* out, std::int64_t row, std::int64_t rows, std::int64_t token,
         std::int64_t tokens) {
    float total[R * C];
    sum_each(acc, total);
    for (std::int64_t c = 0; c < std::min<std::int64_t>(C, tokens - token); c++)
        for (std::int64_t r = 0; r < std::min<std::int64_t>(R, rows - row); r++)
            out[(token + c) * rows + row + r] = from_float<T>(total[c * R + r]);
}

template <int C, class E, class T>
void multiply_stored(const Rows<E>& w, const Tokens& tokens, T* out, int threads) {
    constexpr int R = rows_for(C);
    const float* x[C];
    tokens.at(0, 0, x);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t row = 0; row < w.count; row += R) {
        vfloat acc[R * C] = {};
        multiply_rows<R, C, true>(w, row, x, acc);
        put<R, C>(acc, out, row, w.count, 0, tokens.count);
    }
}

// Values of a row's columns [begin, begin + count), zeros behind them up to whole vectors.
template <class E>
void widen_row(const Rows<E>& w, std::int64_t row, std::int64_t begin, std::int64_t count, float* to) {
    const E* from = w.row(row) + begin;
    const std::int64_t group = Rows<E>::coded ? w.group : w.width;
    for (std::int64_t i = 0, g = begin / group; i < count; g++) {
        const std::int64_t end = std::min((g + 1) * group - begin, count);
        const vfloat by = splat(Rows<E>::coded ? w.scales(row)[g] : 1.0f);
        for (; i + LANES <= end; i += LANES) store(to + i, load(from + i) * by);
        if (i < end) {
            store(to + i, load_part(from + i, end - i) * by);
            i = end;
        }
    }
}

template <class E, class T>
void multiply_widened(const Rows<E>& w, const Tokens& tokens, T* out, int threads) {
    constexpr int C = FEW, R = rows_for(C), TILES = PANEL_ROWS / R;
    const std::int64_t tiles = (tokens.count + C - 1) / C * TILES;
    const std::int64_t room = PANEL_ROWS * PANEL_COLUMNS + tiles * R * C * LANES;
    const auto scratch = array<float>(room * threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t row = 0; row < w.count; row += PANEL_ROWS) {
        float* panel = scratch.get() + room * omp_get_thread_num();
        float* sums = panel + PANEL_ROWS * PANEL_COLUMNS;
        std::fill(sums, panel + room, 0.0f);
        for (std::int64_t begin = 0; begin < w.width; begin += PANEL_COLUMNS) {
            const std::int64_t columns = std::min<std::int64_t>(PANEL_COLUMNS, w.width - begin);
            for (std::int64_t r = 0; r < PANEL_ROWS; r++)
                widen_row(w, std::min(row + r, w.count - 1), begin, columns, panel + r * PANEL_COLUMNS);
            const Rows<float> wide{panel, PANEL_COLUMNS, PANEL_ROWS, round_up(columns, LANES)};
            for (std::int64_t tile = 0; tile < tiles; tile++) {
                vfloat acc[R * C];
                const float* x[C];
                tokens.at(tile / TILES * C, begin, x);
                std::memcpy(acc, sums + tile * R * C * LANES, sizeof acc);
                multiply_rows<R, C, false>(wide, tile % TILES * R, x, acc);
                std::memcpy(sums + tile * R * C * LANES, acc, sizeof acc);
            }
        }
        for (std::int64_t tile = 0; tile < tiles; tile++) {
            vfloat acc[R * C];
            std::memcpy(acc, sums + tile * R * C * LANES, sizeof acc);
            put<R, C>(acc, out, row + tile % TILES * R, w.count, tile / TILES * C, tokens.count);
        }
    }
}

// x @ weight^T for a block of packed tokens, x and out being those of its first one.
template <class E, class T>
void multiply_packed(const Rows<E>& w, const T* x, std::int64_t stride, std::int64_t num_tokens, T* out, int threads) {
    const int parts = std::is_same_v<T, float> ? 3 : 1;
    std::vector<Tile> tiles;
    for (std::int64_t t = 0; t < num_tokens; t += Product::WIDTH) {
        const int count = int(std::min<std::int64_t>(Product::WIDTH, num_tokens - t));
        tiles.push_back({count, int(round_up(count, LANES)), t});
    }
    const std::int64_t num_tiles = std::int64_t(tiles.size()), chunks = (num_tiles + Product::TILES_AT_ONCE - 1) / Product::TILES_AT_ONCE;
    int panel = Product::PANEL;
    while (panel > Product::PANEL / 4 && chunks * w.count < 4 * threads * panel) panel /= 2;
    const std::int64_t num_panels = (w.count + panel - 1) / panel;
    const auto packed = array<Product::Packed>(Product::packed_size(round_up(num_tokens, LANES), w.width, parts));
    const auto panels = array<Product::Packed>(threads * Product::PANEL_SIZE);
    const std::int64_t products = Product::PANEL * Product::TILES_AT_ONCE * Product::WIDTH;
    const auto scratch = array<float>(threads * products);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Product::Session session;
        float* c = scratch.get() + omp_get_thread_num() * products;
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < num_tiles; i++) {
            const T* row[Product::WIDTH];
            for (int n = 0; n < tiles[i].count; n++) row[n] = x + (tiles[i].column + n) * stride;
            Product::pack(row, tiles[i], w.width, parts, packed.get() + Product::packed_size(tiles[i].column, w.width, parts));
        }
#pragma omp for schedule(dynamic)
        for (std::int64_t item = 0; item < chunks * num_panels; item++) {
            const std::int64_t first_tile = item / num_panels * Product::TILES_AT_ONCE, first = item % num_panels * panel;
            const std::span chunk(tiles.data() + first_tile, std::min<std::int64_t>(Product::TILES_AT_ONCE, num_tiles - first_tile));
            const int count = int(std::min<std::int64_t>(panel, w.count - first));
            Row<E> row[Product::PANEL];
            for (int i = 0; i < count; i++) row[i] = {w.row(first + i), w.scales(first + i), Rows<E>::coded ? w.group : w.width};
            Product::multiply(row, count, w.width, std::span<const Tile>(chunk), packed.get(), parts, panel * w.stride,
                              panels.get() + omp_get_thread_num() * Product::PANEL_SIZE, c);
            const std::int64_t padded = round_up(count, Product::ROWS);
            for (const Tile& tile : chunk)
                Product::write(tile, c + (tile.column - chunk[0].column) * padded, count, out + tile.column * w.count + first, w.count);
        }
    }
}

template <class E, class T>
void multiply_some(const Rows<E>& w, const Tokens& tokens, T* out, int threads) {
    if (tokens.count == 1) multiply_stored<1>(w, tokens, out, threads);
    else if (tokens.count == 2) multiply_stored<2>(w, tokens, out, threads);
    else if (tokens.count <= FEW) multiply_stored<FEW>(w, tokens, out, threads);
    else multiply_widened(w, tokens, out, threads);
}

// ---- calls

template <class E>
Rows<E> rows_of(const Tensor& weight, const std::optional<Tensor>& scale) {
    Rows<E> w{data_of<const E>(weight, "weight"), weight.stride(0), std::int64_t(weight.shape(0)),
              std::int64_t(weight.shape(1))};
    if constexpr (Rows<E>::coded) {
        if (!scale) throw std::invalid_argument("int8 codes need scales");
        expect(*scale, "scale", 2);
        const std::int64_t groups = std::int64_t(scale->shape(1));
        w.scale = data_of<const float>(*scale, "scale"), w.scale_stride = scale->stride(0);
        w.group = groups ? w.width / groups : 0;
        if (std::int64_t(scale->shape(0)) != w.count || w.group * groups != w.width || w.group < 1)
            throw std::invalid_argument("scales must be [rows, groups], the groups of one size");
        if (groups > 1 && w.group % 16 != 0)
            throw std::invalid_argument("groups must be multiples of 16 inputs, or whole rows");
    } else if (scale) {
        throw std::invalid_argument("only int8 codes have scales");
    }
    return w;
}

template <class E, class T>
void run(const Rows<E>& w, const Tensor& x, const Tensor& out, int threads) {
    const T* from = data_of<const T>(x, "x_TD");
    T* to = data_of<T>(out, "out");
    const std::int64_t num_tokens = std::int64_t(x.shape(0)), stride = x.stride(0);
    if (!num_tokens || !w.count) return;
    if (w.count * w.width * num_tokens < WORTH_A_THREAD) threads = 1;
    if (num_tokens <= SOME<E, T>) return multiply_some(w, Tokens(from, stride, num_tokens, w.width), to, threads);
    for (std::int64_t t = 0; t < num_tokens; t += TOKENS_AT_ONCE)
        multiply_packed(w, from + t * stride, stride, std::min(TOKENS_AT_ONCE, num_tokens - t), to + t * w.count, threads);
}

template <class E>
void run(const Rows<E>& w, const Tensor& x, const Tensor& out, int threads) {
    if (is_float32(x)) run<E, float>(w, x, out, threads);
    else run<E, bfloat16>(w, x, out, threads);
}

}  // namespace

void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale, const Tensor& out, int threads) {
    expect(x, "x_TD", 2), expect(weight, "weight", 2), expect_dense(out, "out", 2);
    if (weight.shape(1) != x.shape(1) || out.shape(0) != x.shape(0) || out.shape(1) != weight.shape(0))
        throw std::invalid_argument("x, weight and out must be [T, D], [O, D] and [T, O]");
    if (threads < 1) throw std::invalid_argument("threads must be at least 1");
    if (weight.dtype() == nb::dtype<std::int8_t>()) run(rows_of<std::int8_t>(weight, scale), x, out, threads);
    else if (is_float32(weight)) run(rows_of<float>(weight, scale), x, out, threads);
    else run(rows_of<bfloat16>(weight, scale), x, out, threads);
}

namespace {

void linear_each(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& scales,
                 const std::vector<Tensor>& outs, int threads) {
    if (scales.size() != weights.size() || outs.size() != weights.size())
        throw std::invalid_argument("every weight needs its scale, or None, and its out");
    for (std::size_t i = 0; i < weights.size(); i++) linear(x, weights[i], scales[i], outs[i], threads);
}

}  // namespace

void bind_linear(nb::module_& m) {
    m.def("linear", &linear, nb::arg("x_TD"), nb::arg("weight"), nb::arg("scale").none(), nb::arg("out"),
          nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(), "Fill out with x @ weight^T.");
    m.def("linear_each", &linear_each, nb::arg("x_TD"), nb::arg("weights"), nb::arg("scales"), nb::arg("outs"),
          nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>(), "Fill each of outs with x @ weight^T.");
}

}  // namespace openm3
