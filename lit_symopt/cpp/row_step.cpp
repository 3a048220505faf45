// The passes of lit_symopt.cpp.row_step over the rows of a batch of matrices; see there for what they compute.
//
// Every row belongs to one thread, and so does every chunk of rows whose columns are added up; chunks are added in
// their order. So no sum depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>

// B matrices, m rows of n numbers each; G gradient, M momentum, W weight, V direction, X = V or ΠV

struct View {  // [B, m, n]
    void* data;  // or null
    int64_t type;  // see Type
    int64_t matrix, row, column;  // strides in entries
};

struct Step {
    View weight, gradient, momentum, parameter;
    int64_t batch, m, n, chunk;  // rows of a chunk
    int64_t block;  // rows that are gathered at once where columns do not lie side by side
    int64_t nesterov, centered, threads;
    double beta, decay, rate, damping;
    double* norms;  // [B, m] if there are several passes
    double* lengths;  // [2, B]: δ times the rms of the norms, and the norm of the mean of V
    double* sums;  // [B, chunks, n] if centered
    double* means;  // [2, B, n] if centered: of V, and of the rows that W loses
    float* work;  // [threads, (3 block + 2), n + PAD]
};

namespace {

enum Type { FLOAT32, BFLOAT16, FLOAT16 };
enum Pass { DIRECTION_SUMS, NORMS, UPDATE_SUMS, WRITE };
enum Memory { OLD, RENEWED, NEW };  // the momentum that a pass finds: left as it is, renewed, or already new

// Numbers after a row in a buffer: where n is a power of two, rows would share few places of the cache.
constexpr int64_t PAD = 16;

// As of lit_symopt.rules.centering: a row that differs from the mean by no more than this is the mean.
constexpr double ROUNDINGS = 4.0 / (1 << 23);

// ---- numbers in half precision, without the instructions that not all processors have

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float from_bfloat16(uint16_t x) { return from_bits(uint32_t(x) << 16); }

uint16_t to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}

float from_float16(uint16_t x) {
    uint32_t bits = uint32_t(x & 0x7FFF) << 13;
    uint32_t finite = to_bits(from_bits(bits) * 0x1p112f);  // exact, for what is denormal too
    return from_bits((bits >= 0x0F800000 ? bits | 0x7F800000 : finite) | uint32_t(x & 0x8000) << 16);
}

uint16_t to_float16(float x) {
    uint32_t bits = to_bits(x) & 0x7FFFFFFF;
    // Normal: nearest even at bit 13. Denormal: 0.5 has the last digit that is kept for its own.
    uint32_t normal = (bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13;
    uint32_t denormal = to_bits(from_bits(bits) + 0.5f) - 0x3F000000;
    uint32_t large = bits > 0x7F800000 ? 0x7E00 : 0x7C00;
    uint32_t half = bits < 0x38800000 ? denormal : bits >= 0x47800000 ? large : normal;
    return uint16_t(half | ((to_bits(x) >> 16) & 0x8000));
}

float same(float x) { return x; }

// ---- rows, direct or by a buffer

struct Strides {
    int64_t row, column;
};

struct Rows {
    float* data;
    int64_t stride;
};

template <class From, class To, class Convert>
void copy(const From* from, Strides s, To* to, Strides t, int64_t rows, int64_t n, Convert convert) {
    if (s.column == 1 && t.column == 1) {
        for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) to[i * t.row + j] = convert(from[i * s.row + j]);
    } else if (s.row < s.column || t.row < t.column) {
        for (int64_t j = 0; j < n; ++j)
            for (int64_t i = 0; i < rows; ++i)
                to[i * t.row + j * t.column] = convert(from[i * s.row + j * s.column]);
    } else {
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < n; ++j)
                to[i * t.row + j * t.column] = convert(from[i * s.row + j * s.column]);
    }
}

bool direct(const View& x) { return x.type == FLOAT32 && x.column == 1; }

template <class T> T* at(const View& x, int64_t b, int64_t row) {
    return static_cast<T*>(x.data) + b * x.matrix + row * x.row;
}

Rows load(const View& x, int64_t b, int64_t row, int64_t rows, int64_t n, float* buffer) {
    if (!x.data) return {nullptr, 0};
    if (direct(x)) return {at<float>(x, b, row), x.row};
    Strides from{x.row, x.column}, to{n + PAD, 1};
    if (x.type == FLOAT32) copy(at<float>(x, b, row), from, buffer, to, rows, n, same);
    if (x.type == BFLOAT16) copy(at<uint16_t>(x, b, row), from, buffer, to, rows, n, from_bfloat16);
    if (x.type == FLOAT16) copy(at<uint16_t>(x, b, row), from, buffer, to, rows, n, from_float16);
    return {buffer, n + PAD};
}

void store(const View& x, int64_t b, int64_t row, int64_t rows, int64_t n, Rows from) {
    Strides s{from.stride, 1}, t{x.row, x.column};
    if (!x.data || from.data == x.data) return;
    if (x.type == FLOAT32 && !direct(x)) copy(from.data, s, at<float>(x, b, row), t, rows, n, same);
    if (x.type == BFLOAT16) copy(from.data, s, at<uint16_t>(x, b, row), t, rows, n, to_bfloat16);
    if (x.type == FLOAT16) copy(from.data, s, at<uint16_t>(x, b, row), t, rows, n, to_float16);
}

// ---- sums of squares, in the same order wherever a row lies in memory, which a compiler's own vectors do not promise

constexpr int LANES = 16, VECTORS = 4, GROUP = LANES * VECTORS;

template <class T> struct Lanes {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <class T> using Vector = typename Lanes<T>::type;

// Of every `deep` groups in T first, then in float64, as is what is left at the end.
template <class T, class From> double squares(const From* x, int64_t n, int deep) {
    Vector<double> total = {};
    int64_t j = 0;
    while (j + GROUP <= n) {
        Vector<T> sums[VECTORS] = {};
        for (int64_t end = std::min(n, j + deep * GROUP); j + GROUP <= end; j += GROUP)
            for (int k = 0; k < VECTORS; ++k) {
                Vector<From> part;
                std::memcpy(&part, x + j + k * LANES, sizeof part);
                auto wide = __builtin_convertvector(part, Vector<T>);
                sums[k] += wide * wide;
            }
        total += __builtin_convertvector((sums[0] + sums[1]) + (sums[2] + sums[3]), Vector<double>);
    }
    double sum = 0;
    for (int k = 0; k < LANES; ++k) sum += total[k];
    for (; j < n; ++j) sum += double(x[j]) * double(x[j]);
    return sum;
}

// Of four squares a lane in float32, which is right to 3 roundings unless they over- or underflow; float64 holds the
// square of any float32 number.
double norm(const float* x, int64_t n) {
    double sum = squares<float>(x, n, 4);
    return std::sqrt(sum > 1e-32 && sum < 1e38 ? sum : squares<double>(x, n, 1 << 20));
}

double norm(const double* x, int64_t n) { return std::sqrt(squares<double>(x, n, 1 << 20)); }

// ---- one thread

struct Worker {
    const Step& s;
    int64_t chunks, first, last;  // those of this thread, of the whole batch
    float *g_buffer, *m_buffer, *w_buffer, *v_buffer, *x_buffer;

    Worker(const Step& step, int64_t thread, int64_t threads) : s(step) {
        chunks = (s.m + s.chunk - 1) / s.chunk;
        first = s.batch * chunks * thread / threads;
        last = s.batch * chunks * (thread + 1) / threads;
        int64_t row = s.n + PAD;
        g_buffer = s.work + thread * (3 * s.block + 2) * row;
        m_buffer = g_buffer + s.block * row;
        w_buffer = m_buffer + s.block * row;
        v_buffer = w_buffer + s.block * row;
        x_buffer = v_buffer + row;
    }

    void run(Pass pass, Memory memory, bool measured) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
            int64_t b = chunk / chunks, begin = chunk % chunks * s.chunk;
            int64_t end = std::min(begin + s.chunk, s.m);
            double* sums = s.centered ? s.sums + chunk * s.n : nullptr;
            if (pass == DIRECTION_SUMS || pass == UPDATE_SUMS) std::fill(sums, sums + s.n, 0.0);
            for (int64_t row = begin; row < end; row += s.block)
                block(pass, memory, measured, b, row, std::min(s.block, end - row), sums);
        }
    }

    void block(Pass pass, Memory memory, bool measured, int64_t b, int64_t row, int64_t rows, double* sums) {
        bool needs_g = memory != NEW || s.nesterov || !s.momentum.data;
        Rows g = needs_g ? load(s.gradient, b, row, rows, s.n, g_buffer) : Rows{nullptr, 0};
        Rows m = load(s.momentum, b, row, rows, s.n, m_buffer);
        Rows w = pass == WRITE ? load(s.weight, b, row, rows, s.n, w_buffer) : Rows{nullptr, 0};
        for (int64_t i = 0; i < rows; ++i) {
            const float* v = direction(g.data + i * g.stride, m.data ? m.data + i * m.stride : nullptr, memory);
            if (pass == DIRECTION_SUMS) {
#pragma omp simd
                for (int64_t j = 0; j < s.n; ++j) sums[j] += v[j];
                continue;
            }
            const float* x = s.centered ? centered(v, b) : v;
            double length = measured ? s.norms[b * s.m + row + i] : measure(x, b, row + i);
            double factor = pass == NORMS ? 0 : rate(length, b);
            if (pass == UPDATE_SUMS) {
#pragma omp simd
                for (int64_t j = 0; j < s.n; ++j) sums[j] += factor * x[j];
            }
            if (pass == WRITE) write(w.data + i * w.stride, x, factor, b);
        }
        if (memory == RENEWED) store(s.momentum, b, row, rows, s.n, m);
        if (pass == WRITE) {
            store(s.weight, b, row, rows, s.n, w);
            store(s.parameter, b, row, rows, s.n, w);
        }
    }

    const float* direction(const float* g, float* m, Memory memory) {
        float* v = v_buffer;
        float beta = float(s.beta), fresh = float(1.0 - s.beta);
        if (!m) return g;
        if (!s.nesterov && memory == RENEWED) {
#pragma omp simd
            for (int64_t j = 0; j < s.n; ++j) m[j] = beta * m[j] + fresh * g[j];
        }
        if (!s.nesterov) return m;
        if (memory == OLD) {
#pragma omp simd
            for (int64_t j = 0; j < s.n; ++j) v[j] = g[j] + beta * (beta * m[j] + g[j]);
        } else if (memory == RENEWED) {
#pragma omp simd
            for (int64_t j = 0; j < s.n; ++j) {
                m[j] = beta * m[j] + g[j];
                v[j] = g[j] + beta * m[j];
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < s.n; ++j) v[j] = g[j] + beta * m[j];
        }
        return v;
    }

    const float* centered(const float* v, int64_t b) {
        const double* mean = s.means + b * s.n;
        float* x = x_buffer;
#pragma omp simd
        for (int64_t j = 0; j < s.n; ++j) x[j] = float(v[j] - mean[j]);
        return x;
    }

    double measure(const float* x, int64_t b, int64_t row) {
        double length = norm(x, s.n);
        // A row of V that is the mean but for rounding is as long as the mean.
        if (s.centered && length <= 2 * ROUNDINGS * s.lengths[s.batch + b]) length = 0;
        if (s.norms) s.norms[b * s.m + row] = length;
        return length;
    }

    // What X of a row is multiplied by: nothing where it is zero, or nothing but rounding. Beyond the range of float32
    // where the row is denormal.
    double rate(double length, int64_t b) {
        return length == 0 ? 0 : s.rate / (s.damping ? length + s.lengths[b] : length);
    }

    // W less a step that is computed first: neither the decay nor the update loses digits to W.
    void write(float* w, const float* x, double factor, int64_t b) {
        double decay = s.decay;
        float near = float(decay), step = float(factor);
        if (s.centered) {
            const double* mean = s.means + (s.batch + b) * s.n;
#pragma omp simd
            for (int64_t j = 0; j < s.n; ++j) w[j] = float(w[j] - (decay * w[j] + (factor * x[j] - mean[j])));
        } else if (factor == 0 || (std::abs(factor) > 1e-30 && std::abs(factor) < 1e30)) {
#pragma omp simd
            for (int64_t j = 0; j < s.n; ++j) w[j] -= near * w[j] + step * x[j];
        } else {
#pragma omp simd
            for (int64_t j = 0; j < s.n; ++j) w[j] = float(w[j] - (decay * w[j] + factor * x[j]));
        }
    }
};

// Between two passes, by all threads: sums of chunks, in order, to the means of V or of the update.
void take_means(const Step& s, bool of_update) {
    constexpr int64_t COLUMNS = 64;
    int64_t chunks = (s.m + s.chunk - 1) / s.chunk, parts = (s.n + COLUMNS - 1) / COLUMNS;
#pragma omp for
    for (int64_t index = 0; index < s.batch * parts; ++index) {
        int64_t b = index / parts, begin = index % parts * COLUMNS, end = std::min(begin + COLUMNS, s.n);
        double* mean = s.means + (of_update ? s.batch + b : b) * s.n;
        std::fill(mean + begin, mean + end, 0.0);
        for (int64_t chunk = b * chunks; chunk < (b + 1) * chunks; ++chunk)
#pragma omp simd
            for (int64_t j = begin; j < end; ++j) mean[j] += s.sums[chunk * s.n + j];
        for (int64_t j = begin; j < end; ++j) mean[j] /= double(s.m);
    }
    if (of_update) return;
#pragma omp for
    for (int64_t b = 0; b < s.batch; ++b) s.lengths[s.batch + b] = norm(s.means + b * s.n, s.n);
}

void take_rms(const Step& s) {
#pragma omp for
    for (int64_t b = 0; b < s.batch; ++b)
        s.lengths[b] = s.damping * norm(s.norms + b * s.m, s.m) / std::sqrt(double(s.m));
}

}  // namespace

extern "C" void row_step(const Step* step) {
    const Step& s = *step;
#pragma omp parallel num_threads(int(s.threads))
    {
        Worker worker(s, omp_get_thread_num(), omp_get_num_threads());
        // Written where it is read without the gradient later, else last: passes that only read are faster.
        Memory memory = s.nesterov ? OLD : RENEWED;
        bool measured = false;
        auto run = [&](Pass pass) {
            if (pass == WRITE && memory == OLD) memory = RENEWED;
            worker.run(pass, memory, measured);
#pragma omp barrier
            if (memory == RENEWED) memory = NEW;
            measured = measured || pass != DIRECTION_SUMS;
        };
        if (s.centered) {
            run(DIRECTION_SUMS);
            take_means(s, false);
        }
        if (s.damping) {
            run(NORMS);
            take_rms(s);
        }
        if (s.centered) {
            run(UPDATE_SUMS);
            take_means(s, true);
        }
        run(WRITE);
    }
}
