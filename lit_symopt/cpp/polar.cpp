// Polar factors by quintics in bfloat16, and whole steps of the spectral rules, on CPUs with AVX-512 BF16.
//
// Y is a matrix by its long side: L rows of s numbers, L >= s, both padded with zeros to multiples of 16. The CPU
// multiplies pairs: the sum of two products of bfloat16 is added to a float32 number. So a factor of a product is
// stored in words of two numbers that are neighbours along the dimension that is summed over:
//
//   rows     words [L, s/2] of Y: pairs along s, for Y P
//   panels   words [K, 64] of 64 columns after another, K pairs of rows: for A^T B with both factors stored so
//
// Gram matrices and their polynomials are symmetric, so that one storage serves as either factor, and of a product of
// two of them the upper half is computed, in blocks of 16, and stored twice. A matrix stays in the cache of one core
// from the first product to the last; only where there are fewer matrices than threads several share one.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// With AMX torch's products, by oneDNN, are several times as fast as these could be.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define SUPPORTED
#endif

extern "C" int polar_supported() {
#ifdef SUPPORTED
    return 1;
#else
    return 0;
#endif
}

struct Matrices {  // of each tensor [inner, m, n]; data is null if there are none
    char** data;
    const int64_t (*strides)[3];  // in numbers
    int32_t dtype;                // of Dtype
};

struct Step {
    int64_t tensors, inner, m, n;
    int32_t threads, workspaces;  // one workspace, or one for each thread that has a matrix
    char* workspace;
    int64_t workspace_bytes;  // of one
    const double* quintics;   // a, b, c of every step
    const int32_t* form;      // steps between restarts
    int32_t segments;
    float safety, trusted_low, trusted_high;
    Matrices gradient;  // V without momentum
    Matrices momentum;
    float beta, fresh;  // M <- beta M + fresh G
    int32_t nesterov;   // V = G + beta M
    Matrices out;       // U, or without it
    Matrices weight;    // W <- keep W - rate U
    const float *keep, *rate;   // of each tensor
    Matrices parameter;         // the new weight, rounded
};

extern "C" int64_t polar_step_bytes() { return sizeof(Step); }  // of the caller's Step, too

#ifdef SUPPORTED

#include <immintrin.h>
#include <omp.h>

namespace {

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

constexpr int PANEL = 64, BLOCK = 16;
constexpr int AHEAD = 4;           // rows that are fetched before they are needed
constexpr int64_t LONGEST = 2048;  // words of a panel that are summed at once: half a megabyte, which a cache holds

using Word = uint32_t;  // two bfloat16 numbers
using Tile = float[BLOCK][PANEL];

struct Team {
    int rank, size;
    void barrier() const {
        if (size > 1) {
#pragma omp barrier
        }
    }
};

int64_t padded(int64_t size) { return (size + BLOCK - 1) / BLOCK * BLOCK; }

// ---- sixteen numbers at a time

__m512 low(__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
__m512 high(__m512i words) { return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff0000))); }
__m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
__m512 widened(__m256i x) { return low(_mm512_cvtepu16_epi32(x)); }

__m512i both(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

__m512i paired(__m512 first, __m512 second) {  // words of one number of each
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both(first, second));
}

void transpose(__m512 (&x)[16]) {
    __m512 y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + 2 + j]);
            x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for (int j = 0; j < 4; ++j) {
        __m512 a = _mm512_shuffle_f32x4(x[j], x[4 + j], 0x88), b = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0x88);
        __m512 c = _mm512_shuffle_f32x4(x[j], x[4 + j], 0xdd), d = _mm512_shuffle_f32x4(x[8 + j], x[12 + j], 0xdd);
        y[j] = _mm512_shuffle_f32x4(a, b, 0x88);
        y[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
        y[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
        y[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
    std::copy(y, y + 16, x);
}

__m512 load16(const char* at, Dtype dtype) {
    if (dtype == FLOAT32) return _mm512_loadu_ps(at);
    __m256i half = _mm256_loadu_si256((const __m256i*)at);
    return dtype == BFLOAT16 ? widened(half) : _mm512_cvtph_ps(half);
}

__m512 load16(const char* at, Dtype dtype, __mmask16 mask) {
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, at);
    return dtype == BFLOAT16 ? widened(half) : _mm512_cvtph_ps(half);
}

__m256i halved(Dtype dtype, __m512 x) {
    return dtype == BFLOAT16 ? rounded(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}

void store16(char* at, Dtype dtype, __m512 x) {
    if (dtype == FLOAT32)
        _mm512_storeu_ps(at, x);
    else
        _mm256_storeu_si256((__m256i*)at, halved(dtype, x));
}

void store16(char* at, Dtype dtype, __mmask16 mask, __m512 x) {
    if (dtype == FLOAT32)
        _mm512_mask_storeu_ps(at, mask, x);
    else
        _mm256_mask_storeu_epi16(at, mask, halved(dtype, x));
}

__mmask16 first(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << std::max<int64_t>(count, 0)) - 1); }

// ---- matrices in memory, in rows of 16 numbers

struct View {
    char* data;
    int64_t m, n, row, column;  // strides, in numbers
    Dtype dtype;

    View(char* data, int64_t m, int64_t n, int64_t row, int64_t column, Dtype dtype)
        : data(data), m(m), n(n), row(row), column(column), dtype(dtype) {}

    View(const Matrices& of, int64_t tensor, int64_t index, const Step& step)
        : m(step.m), n(step.n), row(of.strides[tensor][1]), column(of.strides[tensor][2]), dtype((Dtype)of.dtype) {
        data = of.data[tensor] + index * of.strides[tensor][0] * size();
    }

    int64_t size() const { return dtype == FLOAT32 ? 4 : 2; }

    char* at(int64_t i, int64_t j) const { return data + (i * row + j * column) * size(); }

    View transposed() const {
        View other(*this);
        std::swap(other.m, other.n);
        std::swap(other.row, other.column);
        return other;
    }

    void prefetch(int64_t i, int64_t j, int64_t rows) const {
        if (column != 1 || j >= n) return;
        for (int64_t r = i; r < std::min(i + rows, m); ++r) _mm_prefetch(at(r, j), _MM_HINT_T0);
    }

    // Whether R rows of 16 numbers can be moved without a mask: with one, processors wait for memory.
    template <int R>
    bool whole(int64_t i, int64_t j) const {
        return column == 1 && i + R <= m && j + BLOCK <= n;
    }

    template <int R>
    void load(int64_t i, int64_t j, __m512 (&x)[R]) const {
        if (whole<R>(i, j)) {
            for (int r = 0; r < R; ++r) x[r] = load16(at(i + r, j), dtype);
            return;
        }
        if (column == 1) {
            for (int r = 0; r < R; ++r)
                x[r] = i + r < m ? load16(at(i + r, j), dtype, first(n - j)) : _mm512_setzero_ps();
            return;
        }
        if constexpr (R == BLOCK) {
            if (row == 1) {
                transposed().load(j, i, x);
                return transpose(x);
            }
        }
        for (int r = 0; r < R; ++r) {
            float line[BLOCK] = {};
            for (int c = 0; c < BLOCK && i + r < m && j + c < n; ++c)
                line[c] = _mm512_cvtss_f32(load16(at(i + r, j + c), dtype, 1));
            x[r] = _mm512_loadu_ps(line);
        }
    }

    template <int R>
    void store(int64_t i, int64_t j, const __m512 (&x)[R]) const {
        if (whole<R>(i, j)) {
            for (int r = 0; r < R; ++r) store16(at(i + r, j), dtype, x[r]);
            return;
        }
        if (column == 1) {
            for (int r = 0; r < R && i + r < m; ++r) store16(at(i + r, j), dtype, first(n - j), x[r]);
            return;
        }
        if constexpr (R == BLOCK) {
            if (row == 1) {
                __m512 y[R];
                std::copy(x, x + R, y);
                transpose(y);
                return transposed().store(j, i, y);
            }
        }
        for (int r = 0; r < R && i + r < m; ++r) {
            float line[BLOCK];
            _mm512_storeu_ps(line, x[r]);
            for (int c = 0; c < BLOCK && j + c < n; ++c) store16(at(i + r, j + c), dtype, 1, _mm512_set1_ps(line[c]));
        }
    }
};

// V of a matrix: the gradient, or what the momentum makes of it.
struct Direction {
    View gradient, momentum;
    float beta, fresh;
    bool has_momentum, update, nesterov;

    void prefetch(int64_t i, int64_t j, int64_t rows) const {
        gradient.prefetch(i, j, rows);
        if (has_momentum) momentum.prefetch(i, j, rows);
    }

    template <int R>  // R rows and 16 columns; writes the momentum if `update`
    void load(int64_t i, int64_t j, __m512 (&x)[R]) const {
        if (!has_momentum) return gradient.load(i, j, x);
        __m512 g[R];
        momentum.load(i, j, x);
        if (update || nesterov) gradient.load(i, j, g);
        if (update) {
            for (int r = 0; r < R; ++r)
                x[r] = _mm512_fmadd_ps(_mm512_set1_ps(beta), x[r], _mm512_mul_ps(_mm512_set1_ps(fresh), g[r]));
            momentum.store(i, j, x);
        }
        if (nesterov)
            for (int r = 0; r < R; ++r) x[r] = _mm512_fmadd_ps(_mm512_set1_ps(beta), x[r], g[r]);
    }
};

// Where U goes: by itself, or to the weight.
struct Target {
    View into, parameter;
    bool has_weight, has_parameter;
    float keep, rate;

    template <int R>
    void write(int64_t i, int64_t j, __m512 (&u)[R]) const {  // overwrites u
        if (has_weight) {
            __m512 w[R];
            into.load(i, j, w);
            for (int r = 0; r < R; ++r)
                u[r] = _mm512_fnmadd_ps(_mm512_set1_ps(rate), u[r], _mm512_mul_ps(_mm512_set1_ps(keep), w[r]));
        }
        into.store(i, j, u);
        if (has_parameter) parameter.store(i, j, u);
    }
};

// ---- products

struct Panels {
    Word* data;
    int64_t pairs;    // K
    int64_t columns;  // s, of a multiple of 16

    int64_t width(int64_t j) const { return std::min<int64_t>(PANEL, columns - j / PANEL * PANEL); }
    Word* at(int64_t pair, int64_t j) const {
        return data + j / PANEL * PANEL * pairs + pair * width(j) + j % PANEL;
    }
};

struct Factor {  // A: words of rows i, along what is summed over
    const Word* data;
    int64_t row, pair;
};

template <int M, int N>  // M rows and 16 N columns of A^T B in registers
__attribute__((always_inline)) inline void multiply(const Factor& a, const Word* b, int64_t width, int64_t pairs,
                                                    float* out, bool add) {
    __m512 sum[M][N];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) sum[i][j] = add ? _mm512_loadu_ps(out + i * PANEL + 16 * j) : _mm512_setzero_ps();
    const Word* at = a.data;
    for (int64_t k = 0; k < pairs; ++k, at += a.pair, b += width) {
        __m512bh right[N];
        for (int j = 0; j < N; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + 16 * j);
        for (int i = 0; i < M; ++i) {
            __m512bh left = (__m512bh)_mm512_set1_epi32(at[i * a.row]);
            for (int j = 0; j < N; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) _mm512_storeu_ps(out + i * PANEL + 16 * j, sum[i][j]);
}

// 16 rows of A^T B, by columns [from, from + 16 blocks) of a panel: tile[:, from % 64 ...], added to if `add`.
void multiply_block(Factor a, const Panels& b, int64_t pair, int64_t pairs, int64_t from, Tile& tile, bool add) {
    const Word* right = b.at(pair, from);
    int64_t width = b.width(from), blocks = (width - from % PANEL) / BLOCK;
    float* out = tile[0] + from % PANEL;
    a.data += pair * a.pair;
    int rows = blocks > 2 ? 4 : 8;
    for (int i = 0; i < BLOCK; i += rows, a.data += rows * a.row, out += rows * PANEL) {
        switch (blocks) {
            case 1: multiply<8, 1>(a, right, width, pairs, out, add); break;
            case 2: multiply<8, 2>(a, right, width, pairs, out, add); break;
            case 3: multiply<4, 3>(a, right, width, pairs, out, add); break;
            default: multiply<4, 4>(a, right, width, pairs, out, add);
        }
    }
}

// A block of 16 x 16 at row i and column j >= i of a symmetric matrix, where it is and where it is mirrored.
void store_symmetric(const Panels& s, int64_t i, int64_t j, const __m512 (&x)[BLOCK]) {
    for (int r = 0; r < BLOCK; r += 2) _mm512_storeu_si512(s.at((i + r) / 2, j), paired(x[r], x[r + 1]));
    if (i == j) return;  // which holds both halves
    // Words of neighbours in a row, eight of row r and eight of row r + 8, become words of one column pair in 16 rows.
    __m512i y[8], z[8];
    for (int r = 0; r < 8; ++r) y[r] = both(x[r], x[r + 8]);
    for (int r = 0; r < 8; r += 2) {
        z[r] = _mm512_unpacklo_epi32(y[r], y[r + 1]);
        z[r + 1] = _mm512_unpackhi_epi32(y[r], y[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        for (int h = 0; h < 2; ++h) {
            y[r + 2 * h] = _mm512_unpacklo_epi64(z[r + h], z[r + 2 + h]);
            y[r + 2 * h + 1] = _mm512_unpackhi_epi64(z[r + h], z[r + 2 + h]);
        }
    }
    const __m512i lower = _mm512_set_epi64(13, 12, 5, 4, 9, 8, 1, 0);
    const __m512i upper = _mm512_set_epi64(15, 14, 7, 6, 11, 10, 3, 2);
    for (int q = 0; q < 4; ++q) {
        _mm512_storeu_si512(s.at(j / 2 + q, i), _mm512_permutex2var_epi64(y[q], lower, y[4 + q]));
        _mm512_storeu_si512(s.at(j / 2 + 4 + q, i), _mm512_permutex2var_epi64(y[q], upper, y[4 + q]));
    }
}

// out <- alpha A^T B + beta D + delta I, for what is symmetric. Of long sums `partial` keeps the parts.
void symmetric_product(const Team& team, const Panels& a, const Panels& b, float alpha, const Panels* d, float beta,
                       float delta, const Panels& out, float* partial) {
    const int64_t side = out.columns;
    const bool in_parts = b.pairs > LONGEST;
    for (int64_t begin = 0; begin < b.pairs; begin += LONGEST) {
        int64_t pairs = std::min(LONGEST, b.pairs - begin);
        bool last = begin + pairs == b.pairs;
        for (int64_t panel = 0; panel < side; panel += PANEL) {
            int64_t end = panel + b.width(panel);
            for (int64_t i = BLOCK * team.rank; i < end; i += BLOCK * team.size) {  // rows above the diagonal
                int64_t from = std::max(panel, i);
                Tile local;
                Tile& tile = in_parts ? *(Tile*)(partial + panel * side + i * PANEL) : local;
                multiply_block({a.at(0, i), 1, a.width(i)}, b, begin, pairs, from, tile, begin > 0);
                for (int64_t j = from; last && j < end; j += BLOCK) {
                    __m512 x[BLOCK];
                    for (int r = 0; r < BLOCK; ++r)
                        x[r] = _mm512_mul_ps(_mm512_loadu_ps(tile[r] + j % PANEL), _mm512_set1_ps(alpha));
                    for (int r = 0; d && r < BLOCK; r += 2) {
                        __m512i words = _mm512_loadu_si512(d->at((i + r) / 2, j));
                        x[r] = _mm512_fmadd_ps(low(words), _mm512_set1_ps(beta), x[r]);
                        x[r + 1] = _mm512_fmadd_ps(high(words), _mm512_set1_ps(beta), x[r + 1]);
                    }
                    for (int r = 0; i == j && r < BLOCK; ++r)
                        x[r] = _mm512_mask_add_ps(x[r], 1 << r, x[r], _mm512_set1_ps(delta));
                    store_symmetric(out, i, j, x);
                }
            }
        }
    }
    team.barrier();
}

struct Long {  // Y
    Word* rows;     // [L, s/2]
    Panels panels;  // L/2 pairs
};

// alpha Y P + beta Y, of which `put` gets blocks of 16 x 16; `before` is told of each tile of 16 x 64 before.
template <class Before, class Put>
void long_product(const Team& team, const Long& y, const Panels& p, float alpha, float beta, Before before, Put put) {
    const int64_t half = p.columns / 2;
    for (int64_t i = BLOCK * team.rank; i < 2 * y.panels.pairs; i += BLOCK * team.size) {
        for (int64_t panel = 0; panel < p.columns; panel += PANEL) {
            before(i, panel, panel + p.width(panel));
            Tile tile;
            multiply_block({y.rows + i * half, half, 1}, p, 0, p.pairs, panel, tile, false);
            for (int64_t j = panel; j < panel + p.width(panel); j += BLOCK) {
                __m512 x[BLOCK];
                for (int r = 0; r < BLOCK; ++r) {
                    __m512 old = widened(_mm256_loadu_si256((const __m256i*)(y.rows + (i + r) * half + j / 2)));
                    x[r] = _mm512_mul_ps(old, _mm512_set1_ps(beta));
                    x[r] = _mm512_fmadd_ps(_mm512_loadu_ps(tile[r] + j - panel), _mm512_set1_ps(alpha), x[r]);
                }
                put(i, j, x);
            }
        }
    }
    team.barrier();
}

template <int R>  // R rows and 16 columns
void store_long(const Long& y, int64_t i, int64_t j, const __m512 (&x)[R]) {
    int64_t half = y.panels.columns / 2;
    for (int r = 0; r < R; ++r) _mm256_storeu_si256((__m256i*)(y.rows + (i + r) * half + j / 2), rounded(x[r]));
    for (int r = 0; r < R; r += 2) _mm512_storeu_si512(y.panels.at((i + r) / 2, j), paired(x[r], x[r + 1]));
}

// ---- one matrix

class Iteration {
  public:
    Iteration(const Step& step, const Team& team, char* workspace, int64_t index)
        : step_(step), team_(team), tensor_(index / step.inner), index_(index % step.inner) {
        long_ = padded(std::max(step.m, step.n));
        side_ = padded(std::min(step.m, step.n));
        char* at = workspace;
        auto take = [&at](int64_t words) {
            Word* found = (Word*)at;
            at += words * sizeof(Word);
            return found;
        };
        y_ = {take(long_ * side_ / 2), {take(long_ * side_ / 2), long_ / 2, side_}};
        spare_ = take(long_ * side_ / 2);
        for (Panels& one : small_) one = {take(side_ * side_ / 2), side_ / 2, side_};
        if (long_ / 2 > LONGEST) partial_ = (float*)take(padded_to_panel(side_) * side_);
    }

    static int64_t padded_to_panel(int64_t side) { return (side + PANEL - 1) / PANEL * PANEL; }

    void run() {
        take_direction(1.0f, step_.momentum.data != nullptr);
        gram();
        float norm = schatten();
        if (!(norm >= step_.trusted_low && norm <= step_.trusted_high)) {  // NaN is neither
            float peak = largest();
            if (!(peak > 0 && peak < INFINITY)) return fill(peak == 0 ? 0.0f : NAN);
            // By a power of two that is a float32 number, as is its inverse.
            take_direction(std::exp2(-std::clamp(std::floor(std::log2(peak)), -126.0f, 126.0f)), false);
            gram();
            norm = schatten();
        }
        iterate(1.0f / (norm * step_.safety));
    }

  private:
    const Step& step_;
    const Team team_;
    int64_t tensor_, index_, long_, side_;
    Long y_;
    Word* spare_;
    Panels small_[5];
    float* partial_ = nullptr;

    bool wide() const { return step_.m < step_.n; }  // then Y is the transpose of the matrix

    View of(const Matrices& matrices) const { return View(matrices, tensor_, index_, step_); }

    Target target() const {
        bool has_weight = step_.weight.data != nullptr, has_parameter = step_.parameter.data != nullptr;
        View into = of(has_weight ? step_.weight : step_.out);
        Target found{into, into, has_weight, has_parameter, 0, 0};
        if (has_weight) found.keep = step_.keep[tensor_], found.rate = step_.rate[tensor_];
        if (has_parameter) found.parameter = of(step_.parameter);
        return found;
    }

    Direction direction(bool update) const {
        Direction found{of(step_.gradient), of(step_.gradient), step_.beta, step_.fresh, false, false, false};
        if (step_.momentum.data) {
            found.momentum = of(step_.momentum);
            found.has_momentum = true;
            found.update = update;
            found.nesterov = step_.nesterov;
        }
        return found;
    }

    // Y <- V times a power of two. Where memory is in rows it is read along them, two at a time: panels hold pairs.
    void take_direction(float unit, bool update) {
        const Direction v = direction(update);  // a copy, which stays in registers; so do others below
        const __m512 by = _mm512_set1_ps(unit);
        const bool rows = v.gradient.column == 1;
        if (rows && wide()) {
            const View staged = staging(BFLOAT16);
            for (int64_t i = 2 * team_.rank; i < side_; i += 2 * team_.size) {
                for (int64_t j = 0; j < long_; j += BLOCK) {
                    __m512 x[2];
                    v.prefetch(i + AHEAD, j, 2);
                    v.load(i, j, x);
                    for (__m512& one : x) one = _mm512_mul_ps(one, by);
                    staged.store(i, j, x);
                }
            }
            team_.barrier();
            take_blocks(staged.transposed());
        } else if (rows) {
            const Long y = y_;
            for (int64_t i = BLOCK * team_.rank; i < long_; i += BLOCK * team_.size) {
                for (int64_t r = i; r < i + BLOCK; r += 2) {
                    for (int64_t j = 0; j < side_; j += BLOCK) {
                        __m512 x[2];
                        v.prefetch(r + AHEAD, j, 2);
                        v.load(r, j, x);
                        for (__m512& one : x) one = _mm512_mul_ps(one, by);
                        store_long(y, r, j, x);
                    }
                }
            }
        } else {
            for (int64_t i = BLOCK * team_.rank; i < long_; i += BLOCK * team_.size) {
                for (int64_t j = 0; j < side_; j += BLOCK) {
                    __m512 x[BLOCK];
                    wide() ? v.load(j, i, x) : v.load(i, j, x);
                    if (wide()) transpose(x);
                    for (__m512& one : x) one = _mm512_mul_ps(one, by);
                    store_long(y_, i, j, x);
                }
            }
        }
        team_.barrier();
    }

    void take_blocks(const View& from) {
        const Long y = y_;
        for (int64_t i = BLOCK * team_.rank; i < long_; i += BLOCK * team_.size) {
            for (int64_t j = 0; j < side_; j += BLOCK) {
                __m512 x[BLOCK];
                from.load(i, j, x);
                store_long(y, i, j, x);
            }
        }
    }

    // The matrix, padded, in memory that holds nothing else before the first product and after the last.
    View staging(Dtype dtype) const {
        Word* free = dtype == BFLOAT16 ? spare_ : std::min(spare_, y_.panels.data);
        return {(char*)free, side_, long_, long_, 1, dtype};
    }

    float largest() const {
        const Direction v = direction(false);
        __m512 found = _mm512_setzero_ps();
        __mmask16 strange = 0;
        for (int64_t i = 0; i < step_.m; i += BLOCK) {
            for (int64_t j = 0; j < step_.n; j += BLOCK) {
                __m512 x[BLOCK];
                v.load(i, j, x);
                for (int r = 0; r < BLOCK; ++r) {
                    strange |= _mm512_cmp_ps_mask(x[r], x[r], _CMP_UNORD_Q);
                    found = _mm512_max_ps(found, _mm512_abs_ps(x[r]));
                }
            }
        }
        return strange ? NAN : _mm512_reduce_max_ps(found);
    }

    void gram() { symmetric_product(team_, y_.panels, y_.panels, 1, nullptr, 0, 0, small_[0], partial_); }

    float schatten() const {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < side_ * side_ / 2; k += 16) {
            __m512i words = _mm512_loadu_si512(small_[0].data + k);
            sum = _mm512_fmadd_ps(low(words), low(words), sum);
            sum = _mm512_fmadd_ps(high(words), high(words), sum);
        }
        return std::sqrt(std::sqrt(_mm512_reduce_add_ps(sum)));
    }

    void polynomial(const Panels& g, const double* abc, float unit, bool identity, const Panels& out) const {
        float a = identity ? (float)abc[0] : 0, b = (float)abc[1] * unit, c = (float)abc[2] * unit * unit;
        symmetric_product(team_, g, g, c, &g, b, a, out, partial_);
    }

    // Products take Y as it is: what it must be multiplied by, `scale`, goes into the first factor after it.
    void iterate(float scale) {
        Panels *g = &small_[0], *p = &small_[1], *q = p, *s = &small_[2], *t = &small_[3], *spare = &small_[4];
        const double* abc = step_.quintics;
        for (int segment = 0; segment < step_.segments; ++segment) {
            float unit = segment ? 1 : scale, alpha = unit, beta = 0;
            if (segment) {
                g = &small_[0], p = &small_[1], s = &small_[2], t = &small_[3], spare = &small_[4];
                gram();
            }
            int count = step_.form[segment];
            polynomial(*g, abc, unit * unit, count > 1, *p);
            q = p;
            if (count == 1) beta = (float)abc[0] * unit;
            abc += 3;
            float square = unit * unit;
            for (int later = 1; later < count; ++later, abc += 3, square = 1) {
                symmetric_product(team_, *g, *p, square, nullptr, 0, 0, *s, partial_);  // G P
                symmetric_product(team_, *p, *s, 1, nullptr, 0, 0, *t, partial_);       // P G P
                std::swap(g, t);
                polynomial(*g, abc, 1, true, *s);
                symmetric_product(team_, *q, *s, 1, nullptr, 0, 0, *t, partial_);
                Panels *old_p = p, *old_q = q;
                q = t, p = s, s = old_p;
                t = old_q == old_p ? spare : old_q;
                spare = nullptr;
            }
            if (segment + 1 < step_.segments)
                next_long(*q, alpha, beta);
            else
                finish(*q, alpha, beta);
        }
    }

    void next_long(const Panels& p, float alpha, float beta) {
        const Long next{spare_, y_.panels};
        auto put = [next](int64_t i, int64_t j, const __m512(&x)[BLOCK]) { store_long(next, i, j, x); };
        long_product(team_, y_, p, alpha, beta, [](int64_t, int64_t, int64_t) {}, put);
        std::swap(spare_, y_.rows);
    }

    void finish(const Panels& p, float alpha, float beta) const {
        const Target target = this->target();
        if (!wide()) {
            auto before = [&target](int64_t i, int64_t j, int64_t end) {
                for (; j < end; j += BLOCK) target.into.prefetch(i, j, BLOCK);
            };
            auto put = [&target](int64_t i, int64_t j, __m512(&x)[BLOCK]) { target.write(i, j, x); };
            return long_product(team_, y_, p, alpha, beta, before, put);
        }
        const View staged = staging(FLOAT32), by_columns = staged.transposed();
        auto put = [by_columns](int64_t i, int64_t j, __m512(&x)[BLOCK]) { by_columns.store(i, j, x); };
        long_product(team_, y_, p, alpha, beta, [](int64_t, int64_t, int64_t) {}, put);
        for (int64_t i = 2 * team_.rank; i < step_.m; i += 2 * team_.size) {
            for (int64_t j = 0; j < step_.n; j += BLOCK) {
                __m512 x[2];
                target.into.prefetch(i + AHEAD, j, 2);
                staged.load(i, j, x);
                target.write(i, j, x);
            }
        }
        team_.barrier();
    }

    void fill(float value) const {
        const Target target = this->target();
        for (int64_t i = BLOCK * team_.rank; i < step_.m; i += BLOCK * team_.size) {
            for (int64_t j = 0; j < step_.n; j += BLOCK) {
                __m512 x[BLOCK];
                std::fill(x, x + BLOCK, _mm512_set1_ps(value));
                target.write(i, j, x);
            }
        }
        team_.barrier();
    }
};

}  // namespace

extern "C" int64_t polar_workspace_bytes(int64_t m, int64_t n) {
    int64_t longer = padded(std::max(m, n)), side = padded(std::min(m, n));
    int64_t words = 3 * longer * side / 2 + 5 * side * side / 2;
    if (longer / 2 > LONGEST) words += Iteration::padded_to_panel(side) * side;
    return (words * (int64_t)sizeof(Word) + 255) / 256 * 256;
}

extern "C" void polar_step(const Step* step) {
    int64_t count = step->tensors * step->inner, alone = count;
    int threads = std::max(1, step->threads);
    // What is left after the last full round is shared by all threads, unless it leaves few of them idle.
    if (threads > 1 && 2 * (count % threads) <= threads) alone = count - count % threads;
    if (step->workspaces < std::min<int64_t>(threads, count)) alone = 0;
#pragma omp parallel num_threads(threads)
    {
        int rank = omp_get_thread_num(), size = omp_get_num_threads();
        for (int64_t index = rank; index < alone; index += size)
            Iteration(*step, {0, 1}, step->workspace + rank * step->workspace_bytes, index).run();
        if (alone < count) {
#pragma omp barrier
            for (int64_t index = alone; index < count; ++index)
                Iteration(*step, {rank, size}, step->workspace, index).run();
        }
    }
}

#else

extern "C" int64_t polar_workspace_bytes(int64_t, int64_t) { return 0; }
extern "C" void polar_step(const Step*) {}

#endif
