/* Attention of a few queries over many keys that lie as a ring keeps them: packed as they are read, softmax on the way. */

#pragma once
#include "units.h"

#define KEYS 160 /* taken at a time */

#ifdef __AVX512F__
INLINE void transpose(const unit *from, ptrdiff_t stride, unit *to) { /* 16 rows of 16 units */
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(from + i * stride);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * 16, _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * 16, _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * 16, _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * 16, _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd));
    }
}
#else
INLINE void transpose(const unit *from, ptrdiff_t stride, unit *to) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) to[j * 16 + i] = from[i * stride + j];
}
#endif

/* Keys (count, E) as panels of 16 keys. Those missing from the last panel are the last key again: their scores are not used. */
static void pack_keys(int count, int width, const element *keys, unit *to) {
    int units = width / PER_UNIT;
    for (int first = 0; first < count; first += 16, to += units * 16)
        for (int j = 0; j < units; j += 16) {
            const unit *from = (const unit *)(keys + (ptrdiff_t)first * width) + j;
            if (first + 16 <= count) {
                transpose(from, units, to + j * 16);
            } else {
                unit rest[16 * 16];
                for (int i = 0; i < 16; i++) {
                    int key = first + i < count ? i : count - 1 - first;
                    memcpy(rest + i * 16, from + (ptrdiff_t)key * units, 64);
                }
                transpose(rest, 16, to + j * 16);
            }
        }
}

/* Values (count, E) as panels of 16 channels over `units` units of keys; those beyond count are 0. */
static void pack_values(int count, int width, int units, const element *values, unit *to) {
    for (int k = 0; k < units; k++)
        for (int j = 0; j < width / PANEL; j++) {
            unit *place = to + ((ptrdiff_t)j * units + k) * PANEL;
            const element *from = values + (ptrdiff_t)k * PER_UNIT * width + j * PANEL;
#ifdef BF16
            __m256i first = 2 * k < count ? _mm256_loadu_si256((const void *)from) : _mm256_setzero_si256();
            __m256i second = 2 * k + 1 < count ? _mm256_loadu_si256((const void *)(from + width)) : _mm256_setzero_si256();
            __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
            _mm512_storeu_si512(place, pairs);
#else
            for (int i = 0; i < PANEL; i += LANES) store((float *)place + i, k < count ? load(from + i) : all(0));
#endif
        }
}

typedef struct {
    float *scores, *out, *most, *sum; /* (m, KEYS), (m, E), (m,), (m,) */
    unit *weights, *keys, *values;    /* (m, KEYS), (KEYS, E), (KEYS, E) */
} attending;

/* One head: queries (m, E), which hold the scale and log2(e) already, over keys and values (count, E) -> rows `stride` apart. Those
   of the next head lie `next` elements further on. */
static void attend(int m, int width, const element *q, const element *keys, const element *values, int count, ptrdiff_t next,
                   attending at, element *to, ptrdiff_t stride) {
    for (int r = 0; r < m; r++) at.most[r] = -INFINITY, at.sum[r] = 0;
    memset(at.out, 0, sizeof(float) * m * width);
    for (int first = 0; first < count; first += KEYS, keys += KEYS * width, values += KEYS * width) {
        ptrdiff_t then = first + KEYS < count ? KEYS * width : next - (ptrdiff_t)first * width;
        const unit *keys_soon = (const unit *)(keys + then), *values_soon = (const unit *)(values + then);
        int now = count - first < KEYS ? count - first : KEYS, panels = (now + PANEL - 1) / PANEL;
        int units = (now + 16 * PER_UNIT - 1) / (16 * PER_UNIT) * 16, columns = units * PER_UNIT; /* tiles take 16 units */
        pack_keys(now, width, keys, at.keys);
        pack_values(now, width, units, values, at.values);
        int inner = width / PER_UNIT;
        multiply((factors){(const unit *)q, at.keys, keys_soon, at.scores, inner, KEYS, 0, m, inner, 1, panels, 0});
        for (int r = 0; r < m; r++) {
            float *row = at.scores + r * KEYS, most = at.most[r];
            for (int j = now; j < columns; j++) row[j] = -INFINITY;
            vec high = load(row);
            for (int j = LANES; j < columns; j += LANES) high = larger(high, load(row + j));
            float top = largest(high);
            if (top > most) {
                vec less = exp2v(all(most - top));
                for (int j = 0; j < width; j += LANES) store(at.out + r * width + j, load(at.out + r * width + j) * less);
                at.sum[r] *= less[0];
                at.most[r] = most = top;
            }
            vec sum = all(0);
            element *weights = (element *)(at.weights + r * KEYS);
            for (int j = 0; j < columns; j += LANES) {
                vec weight = exp2v(load(row + j) - most);
                narrow(weights + j, weight);
                sum += weight;
            }
            at.sum[r] += total(sum);
        }
        multiply((factors){at.weights, at.values, values_soon, at.out, KEYS, width, 0, m, units, 1, width / PANEL, 1});
    }
    for (int r = 0; r < m; r++)
        for (int j = 0; j < width; j += LANES) narrow(to + r * stride + j, load(at.out + r * width + j) / at.sum[r]);
}

static inline ptrdiff_t attending_floats(int m, int width) { return m * (2 * KEYS + width + 2) + 2 * KEYS * width; }

static inline attending attending_in(float *memory, int m, int width) {
    attending at = {.scores = memory};
    at.out = at.scores + m * KEYS;
    at.most = at.out + m * width;
    at.sum = at.most + m;
    at.weights = (unit *)(at.sum + m);
    at.keys = at.weights + m * KEYS;
    at.values = at.keys + KEYS * width;
    return at;
}
