/* Numbers and matrix products of the compiled engine.

   Elements are bfloat16 (-DBF16, AVX512-BF16 or AMX) or float32 (any CPU; GCC or Clang). Products read *units* of 4 bytes: one
   float32, or two bfloat16 that follow each other in the direction that is summed over. Their right factor lies in *panels* of 16
   columns: [unit][16]. Vectors are as wide as the CPU's; every width that is gone through is a multiple of 16. */

#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#define PRAGMA(words) _Pragma(#words)
#define PARALLEL(threads) PRAGMA(omp parallel num_threads(threads))
#define TOGETHER PRAGMA(omp barrier)
#define ME omp_get_thread_num()
#define ALL omp_get_num_threads()
#else
#define PARALLEL(threads)
#define TOGETHER
#define ME 0
#define ALL 1
#endif

#define PANEL 16
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))
#define HIDDEN __attribute__((visibility("hidden"))) /* from the other library that a process may have loaded */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t unit;

#ifdef BF16
#if !defined(__AVX512BF16__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || !defined(__AVX512VL__)
#error "this CPU does not multiply bfloat16"
#endif
#define PER_UNIT 2
typedef uint16_t element;
#else
#define PER_UNIT 1
typedef float element;
#endif

#ifdef __clang__
#define SHUFFLE(x, ...) __builtin_shufflevector(x, x, __VA_ARGS__)
#else
#define SHUFFLE(x, ...) __builtin_shuffle(x, (ints){__VA_ARGS__})
#endif

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
INLINE vec all(float x) { return (vec){0} + x; }

#ifdef BF16
INLINE void narrow(element *to, vec x) { _mm256_storeu_si256((void *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
INLINE vec dot(vec sum, unit a, vec b) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#else
INLINE void narrow(element *to, vec x) { store(to, x); }
INLINE vec dot(vec sum, unit a, vec b) {
    float value;
    memcpy(&value, &a, 4);
    return sum + value * b;
}
#endif

INLINE vec larger(vec x, vec y) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)x, (__m512)y);
#else
    ints less = x < y;
    return (vec)(((ints)y & less) | ((ints)x & ~less));
#endif
}

#if LANES == 16
#define HALVES(x) SHUFFLE(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define QUARTERS(x) SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define PAIRS(x) SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define SWAPPED(x) SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#elif LANES == 8
#define HALVES(x) (x)
#define QUARTERS(x) SHUFFLE(x, 4, 5, 6, 7, 0, 1, 2, 3)
#define PAIRS(x) SHUFFLE(x, 2, 3, 0, 1, 6, 7, 4, 5)
#define SWAPPED(x) SHUFFLE(x, 1, 0, 3, 2, 5, 4, 7, 6)
#else
#define HALVES(x) (x)
#define QUARTERS(x) (x)
#define PAIRS(x) SHUFFLE(x, 2, 3, 0, 1)
#define SWAPPED(x) SHUFFLE(x, 1, 0, 3, 2)
#endif

INLINE float largest(vec x) {
    x = larger(x, HALVES(x));
    x = larger(x, QUARTERS(x));
    x = larger(x, PAIRS(x));
    return larger(x, SWAPPED(x))[0];
}

INLINE float total(vec x) {
    if (LANES > 8) x += HALVES(x);
    if (LANES > 4) x += QUARTERS(x);
    x += PAIRS(x);
    return (x + SWAPPED(x))[0];
}

/* 2^x of x up to 126; of far less than -126 it is nothing beside the 2^0 of a softmax. */
INLINE vec exp2v(vec x) {
#ifdef BF16
    vec f = (vec)_mm512_reduce_ps((__m512)x, 9); /* x - floor(x) */
    vec p = all(7.802472e-2f);
    p = p * f + 2.2606716e-1f;
    p = p * f + 6.9583354e-1f;
    p = p * f + 9.9992522e-1f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)x); /* p 2^floor(x) */
#else
    x = larger(all(-126.f), x);
    vec shifted = x + 12582912.f; /* 1.5 * 2^23: the integer part lies in the last bits */
    vec f = x - (shifted - 12582912.f);
    vec p = all(1.33389e-3f);
    p = p * f + 9.61817e-3f;
    p = p * f + 5.550332e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.f;
    return (vec)((ints)p + (((ints)shifted) << 23));
#endif
}

/* Into the core's cache, before it is asked for: a CPU that guesses by itself stops guessing at every page. */
INLINE void fetch(const void *line) { __builtin_prefetch(line, 0, 2); }

/* The part of thread ME of ALL of `of` things that go in grains: from share(.., ME, ..) to share(.., ME + 1, ..). */
INLINE int share(int of, int thread, int threads, int grain) {
    int grains = (of + grain - 1) / grain, end = (int)((int64_t)grains * thread / threads) * grain;
    return end < of ? end : of;
}

static inline ptrdiff_t aligned(ptrdiff_t bytes) { return (bytes + 63) / 64 * 64; }

/* ---- products: C (m, 16 panels) = A B, or += where `add` ------------------------------------------------------------------------

   A row of A is `parts` runs of `units` units, `apart` units from each other: a convolution reads three rows of pixels, a linear
   layer one run. B has all of them one behind the other. Meanwhile as much as B is fetched from `soon` on. */

typedef struct {
    const unit *a, *b, *soon;
    float *c;
    ptrdiff_t lda, ldc, apart; /* units, floats, units */
    int m, units, parts, panels, add;
} factors;

#if defined(__AVX512F__) /* as many sums as registers hold */
#define ROWS 8
#define COLUMNS 2
#elif defined(__AVX__) || defined(__aarch64__)
#define ROWS 6
#define COLUMNS 1
#else
#define ROWS 2
#define COLUMNS 1
#endif
#define ACROSS (PANEL / LANES)

INLINE void product_block(int rows, int columns, factors f) {
    vec sum[ROWS][COLUMNS * ACROSS];
    ptrdiff_t panel = (ptrdiff_t)f.parts * f.units * PANEL;
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < columns * ACROSS; j++) sum[r][j] = f.add ? load(f.c + r * f.ldc + j * LANES) : all(0);
    for (int p = 0; p < f.parts; p++, f.a += f.apart)
        for (int k = 0; k < f.units; k++, f.b += PANEL, f.soon += PANEL) {
            vec right[COLUMNS * ACROSS];
            for (int j = 0; j < columns; j++) fetch(f.soon + j * panel);
            for (int j = 0; j < columns * ACROSS; j++)
                right[j] = load((const float *)(f.b + j / ACROSS * panel + j % ACROSS * LANES));
            for (int r = 0; r < rows; r++)
                for (int j = 0; j < columns * ACROSS; j++) sum[r][j] = dot(sum[r][j], f.a[r * f.lda + k], right[j]);
        }
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < columns * ACROSS; j++) store(f.c + r * f.ldc + j * LANES, sum[r][j]);
}

#define BLOCK(rows)                      \
    case rows:                           \
        product_block(rows, columns, f); \
        break;
INLINE void product_rows(int columns, factors f) {
    for (; f.m > 0; f.m -= ROWS, f.a += ROWS * f.lda, f.c += ROWS * f.ldc) {
        switch (f.m < ROWS ? f.m : ROWS) {
            BLOCK(1) BLOCK(2)
#if ROWS > 2
            BLOCK(3) BLOCK(4) BLOCK(5) BLOCK(6)
#endif
#if ROWS > 6
            BLOCK(7) BLOCK(8)
#endif
        }
    }
}

static void product_vectors(factors f) {
    ptrdiff_t panel = (ptrdiff_t)f.parts * f.units * PANEL;
    int p = 0;
    for (; p + COLUMNS <= f.panels; p += COLUMNS, f.b += COLUMNS * panel, f.soon += COLUMNS * panel, f.c += COLUMNS * PANEL)
        product_rows(COLUMNS, f);
    for (; p < f.panels; p++, f.b += panel, f.soon += panel, f.c += PANEL) product_rows(1, f);
}

HIDDEN extern int tiles; /* whether those of AMX are used */
#if defined(BF16) && defined(__AMX_BF16__)
HIDDEN extern __thread int tiled_for; /* rows that the tiles of this thread have their shape for; 0: none */

/* Tiles 0 to 2 hold up to 48 rows of C, 3 to 5 of A, 6 a part of B. */
static void shape_tiles(int m) {
    struct {
        uint8_t palette, start, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape;
    if (tiled_for == m) return;
    memset(&shape, 0, sizeof shape);
    shape.palette = 1;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    for (int i = 0; i < 3; i++) {
        int rows = m - 16 * i;
        shape.rows[i] = shape.rows[3 + i] = rows >= 16 || rows <= 0 ? 16 : rows;
    }
    _tile_loadconfig(&shape);
    tiled_for = m;
}

INLINE void leave_tiles(void) {
    if (tiled_for) _tile_release();
    tiled_for = 0;
}

/* For a tile of C and its tile of A, whose names must be written out. */
#define FIRST(tile, left)                                                \
    {                                                                    \
        if (f.add)                                                       \
            _tile_loadd(tile, c + (ptrdiff_t)16 * tile * f.ldc, 4 * f.ldc); \
        else                                                             \
            _tile_zero(tile);                                            \
    }
#define STEP(tile, left)                                                      \
    {                                                                         \
        _tile_loadd(left, a + (ptrdiff_t)16 * tile * f.lda + k, 4 * f.lda);   \
        _tile_dpbf16ps(tile, left, 6);                                        \
    }
#define LAST(tile, left) _tile_stored(tile, c + (ptrdiff_t)16 * tile * f.ldc, 4 * f.ldc);
#define EACH(what)                  \
    what(0, 3);                     \
    if (rows > 16) what(1, 4);      \
    if (rows > 32) what(2, 5);

static void product_tiles(factors f) {
    for (; f.m > 0; f.m -= 48, f.a += 48 * f.lda, f.c += 48 * f.ldc) {
        int rows = f.m < 48 ? f.m : 48;
        const unit *right = f.b, *soon = f.soon;
        float *c = f.c;
        shape_tiles(rows);
        for (int p = 0; p < f.panels; p++, c += PANEL) {
            const unit *a = f.a;
            EACH(FIRST)
            for (int part = 0; part < f.parts; part++, a += f.apart)
                for (int k = 0; k < f.units; k += 16, right += 16 * PANEL, soon += 16 * PANEL) {
                    _tile_loadd(6, right, 64);
                    for (int line = 0; line < 16; line++) fetch(soon + line * PANEL);
                    EACH(STEP)
                }
            EACH(LAST)
        }
    }
}
#else
INLINE void leave_tiles(void) {}
#endif

INLINE void multiply(factors f) {
#if defined(BF16) && defined(__AMX_BF16__)
    if (tiles) {
        product_tiles(f);
        return;
    }
#endif
    product_vectors(f);
}
