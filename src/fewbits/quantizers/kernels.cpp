// LSQ and signs in one pass over memory, for processors: what learned_step.py and rounding.py compute, bit for bit. native.py
// compiles this file; where there is no compiler nothing but time is lost.
//
// Every element goes through the operations that PyTorch's operators would make of it, in float32, without contraction;
// comparisons are written so that NaN stays NaN. Sums are made as sums.py makes them, in blocks that are halved again
// and again: their bits depend neither on threads nor on the width of registers.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr long BLOCK = 2048;             // as in sums.py
constexpr float SMALLEST_STEP = 1e-8f;  // as in rounding.py

struct bfloat16 {
    uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void store(float &place, float value) { place = value; }

inline void store(bfloat16 &place, float value) {  // to nearest, halves to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    place.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0);
}

inline float clip(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// What stands in front of a quantizer: nothing, or a ReLU, whose result may end at a ceiling.
struct Nothing {
    float operator()(float value) const { return value; }
    bool passes(float) const { return true; }
};

struct ReLU {
    float ceiling;

    float operator()(float value) const {
        value = value <= 0.0f ? 0.0f : value;
        return value > ceiling ? ceiling : value;
    }
    // A gradient; NaN's, too, and infinity's where there is no ceiling.
    bool passes(float value) const { return !(value <= 0.0f) && (!(value >= ceiling) || std::isinf(ceiling)); }
};

inline float at_least(float step) { return step < SMALLEST_STEP ? SMALLEST_STEP : step; }

long blocks_of(long inner) { return (inner + BLOCK - 1) / BLOCK; }

long power_of_two(long size) {
    long power = 1;
    while (power < size) power *= 2;
    return power;
}

// One block of one group: groups lie behind one another in memory, and each has its own step.
struct Block {
    long group, number, first, size;

    Block(long which, long inner) {
        group = which / blocks_of(inner);
        number = which % blocks_of(inner);
        first = group * inner + number * BLOCK;
        size = inner - number * BLOCK < BLOCK ? inner - number * BLOCK : BLOCK;
    }
};

// There must be room up to the next power of two.
float halved(float *values, long size) {
    long width = power_of_two(size);
    for (long i = size; i < width; i++) values[i] = 0.0f;
    while (width > 1) {
        width /= 2;
        for (long i = 0; i < width; i++) values[i] += values[i + width];
    }
    return values[0];
}

template <typename X, typename Front>
void lsq(const X *__restrict x, Front front, float *__restrict y, long groups, long inner, const float *steps,
         float low, float high, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long which = 0; which < groups * blocks_of(inner); which++) {
        const Block block(which, inner);
        const X *__restrict from = x + block.first;
        float *__restrict to = y + block.first;
        const float step = at_least(steps[block.group]);
        for (long i = 0; i < block.size; i++) to[i] = clip(std::rint(front(load(from[i])) / step), low, high) * step;
    }
}

template <typename X, typename G, typename Front>
void lsq_backward(const X *__restrict x, Front front, const G *__restrict grad, X *__restrict grad_x,
                  float *__restrict grad_steps, float *__restrict sums, long groups, long inner, const float *steps,
                  float low, float high, float gradient_scale, int threads) {
    const long room = power_of_two(blocks_of(inner));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long which = 0; which < groups * blocks_of(inner); which++) {
        const Block block(which, inner);
        const X *__restrict from = x + block.first;
        const G *__restrict given = grad + block.first;
        X *__restrict to = grad_x + block.first;
        const float step = at_least(steps[block.group]);
        alignas(64) float share[BLOCK];
        for (long i = 0; i < block.size; i++) {
            const float g = load(given[i]), value = load(from[i]), scaled = front(value) / step;
            const float clipped = clip(scaled, low, high), inside = scaled == clipped ? 1.0f : 0.0f;
            store(to[i], front.passes(value) ? g * inside : 0.0f);
            share[i] = g * (std::rint(clipped) - clipped * inside);
        }
        sums[block.group * room + block.number] = halved(share, block.size);
    }
    for (long group = 0; group < groups; group++) {
        const float grad_step = halved(sums + group * room, blocks_of(inner)) * gradient_scale;
        // A descent step subtracts it: at the floor only what raises the step passes, see positive() in rounding.py.
        grad_steps[group] = !(steps[group] > SMALLEST_STEP) && grad_step > 0.0f ? 0.0f : grad_step;
    }
}

template <typename Function>
void each(long size, int threads, Function function) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long first = 0; first < size; first += BLOCK) {
        const long end = size - first < BLOCK ? size : first + BLOCK;
        for (long i = first; i < end; i++) function(i);
    }
}

template <typename Function>
void with_front(float ceiling, Function function) {
    ceiling > 0.0f ? function(ReLU{ceiling}) : function(Nothing{});
}

}  // namespace

extern "C" {

// The types of memory: 0 is float32, 1 is bfloat16. Bounds may be values of tensors. A ceiling is that of the ReLU in
// front, infinity where it has none; 0 is no ReLU.
void fewbits_lsq(const void *x, int x_type, float ceiling, float *y, long groups, long inner, const float *steps,
                 const float *low, const float *high, int threads) {
    with_front(ceiling, [&](auto front) {
        const auto run = [&](auto *from) { lsq(from, front, y, groups, inner, steps, *low, *high, threads); };
        x_type ? run(static_cast<const bfloat16 *>(x)) : run(static_cast<const float *>(x));
    });
}

// grad_steps: one for each group. sums: room for a power of two of blocks for each group.
void fewbits_lsq_backward(const void *x, int x_type, float ceiling, const void *grad, int grad_type, void *grad_x, float *grad_steps,
                          float *sums, long groups, long inner, const float *steps, const float *low, const float *high,
                          float gradient_scale, int threads) {
    const auto run = [&](auto *from, auto *to, auto *given) {
        with_front(ceiling, [&](auto front) {
            lsq_backward(from, front, given, to, grad_steps, sums, groups, inner, steps, *low, *high, gradient_scale,
                         threads);
        });
    };
    const auto given_any = [&](auto *from, auto *to) {
        grad_type ? run(from, to, static_cast<const bfloat16 *>(grad)) : run(from, to, static_cast<const float *>(grad));
    };
    x_type ? given_any(static_cast<const bfloat16 *>(x), static_cast<bfloat16 *>(grad_x))
           : given_any(static_cast<const float *>(x), static_cast<float *>(grad_x));
}

void fewbits_sign(const float *__restrict x, float *__restrict y, long size, int threads) {
    each(size, threads, [=](long i) { y[i] = x[i] >= 0.0f ? 1.0f : -1.0f; });
}

// Slopes of rounding.py, by their number: |x| <= clip, |x| < clip, and the tent.
void fewbits_sign_backward(const float *__restrict x, const float *__restrict grad, float *__restrict grad_x, long size,
                           int slope, float bound, int threads) {
    if (slope == 0)
        each(size, threads, [=](long i) { grad_x[i] = grad[i] * (std::fabs(x[i]) <= bound ? 1.0f : 0.0f); });
    else if (slope == 1)
        each(size, threads, [=](long i) { grad_x[i] = grad[i] * (std::fabs(x[i]) < bound ? 1.0f : 0.0f); });
    else
        each(size, threads, [=](long i) {
            const float height = 2.0f - 2.0f * std::fabs(x[i]);
            grad_x[i] = grad[i] * (height < 0.0f ? 0.0f : height);
        });
}
}
