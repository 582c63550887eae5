/* The tiles of AMX in plain C, for CPUs that have none: what is wrong for the real ones ends the process. Put before all else
   (-include); `use_tiles` then finds that the system permits them. */

#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, start, zero[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_shape;

static __thread tile_shape shaped;
static __thread float tile[8][16][16];

static inline void must(int holds) {
    if (!holds) abort();
}

static inline float wide(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline void load_shape(const void *from) {
    memcpy(&shaped, from, sizeof shaped);
    must(shaped.palette == 1);
    for (int i = 0; i < 8; i++) must(shaped.rows[i] && shaped.rows[i] <= 16 && shaped.bytes[i] && shaped.bytes[i] <= 64);
    memset(tile, 0, sizeof tile);
}

static inline void load_tile(int to, const void *from, ptrdiff_t stride) {
    must(shaped.palette == 1);
    memset(tile[to], 0, sizeof tile[to]);
    for (int r = 0; r < shaped.rows[to]; r++) memcpy(tile[to][r], (const char *)from + r * stride, shaped.bytes[to]);
}

static inline void store_tile(int from, void *to, ptrdiff_t stride) {
    must(shaped.palette == 1);
    for (int r = 0; r < shaped.rows[from]; r++) memcpy((char *)to + r * stride, tile[from][r], shaped.bytes[from]);
}

static inline void multiply_tiles(int c, int a, int b) {
    uint16_t left[16][32], right[16][32];
    memcpy(left, tile[a], sizeof left);
    memcpy(right, tile[b], sizeof right);
    must(shaped.rows[a] == shaped.rows[c] && shaped.bytes[b] == shaped.bytes[c] && 4 * shaped.rows[b] == shaped.bytes[a]);
    for (int m = 0; m < shaped.rows[c]; m++)
        for (int k = 0; k < shaped.rows[b]; k++)
            for (int n = 0; n < shaped.bytes[c] / 4; n++)
                for (int i = 0; i < 2; i++) tile[c][m][n] += wide(left[m][2 * k + i]) * wide(right[k][2 * n + i]);
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) load_shape(from)
#define _tile_release() memset(&shaped, 0, sizeof shaped)
#define _tile_zero(to) memset(tile[to], 0, sizeof tile[to])
#define _tile_loadd(to, from, stride) load_tile(to, from, stride)
#define _tile_stored(from, to, stride) store_tile(from, to, stride)
#define _tile_dpbf16ps(c, a, b) multiply_tiles(c, a, b)
#define syscall(...) 0L
