/* The decoder of the small autoencoder: 3x3 convolutions over pictures whose channels lie together, with a border of zeros. All
   pixels of a picture, border included, are rows of one product; a row of its left factor is three runs of three pixels. What falls
   on the border is thrown away. */

#include "units.h"

#define PIXELS 48 /* taken at a time */

/* y = conv(source) + bias, plus what is kept where `add`. Then, of the pixel, or of the four that it becomes where `shuffle`: y is
   kept where `keep`, and it or (`relu`) its positive part is the next one's source. The last makes the picture. */
typedef struct {
    int height, width, inputs, outputs, add, keep, relu, shuffle;
    const unit *weight; /* outputs of one of the four pixels lie together */
    const float *bias;
} convolution;

typedef struct {
    const convolution *steps;
    int count, channels, threads;
    const float *latent, *scale, *shift; /* (C, h, w), (C,), (C,) */
    uint8_t *picture;                    /* (H, W, 3) */
    char *memory;                        /* `decode_bytes` of it, aligned to 64: zeros before the first call */
} decoding;

static ptrdiff_t source_bytes(const convolution *c) {
    return aligned((ptrdiff_t)(c->height + 2) * (c->width + 2) * c->inputs * sizeof(element));
}

static ptrdiff_t own_floats(const decoding *job) {
    ptrdiff_t most = 0;
    for (int i = 0; i < job->count; i++)
        if (job->steps[i].outputs * PIXELS > most) most = job->steps[i].outputs * PIXELS;
    return most;
}

/* Of all sources, which lie one behind the other. */
static ptrdiff_t sources_bytes(const decoding *job) {
    ptrdiff_t bytes = 0;
    for (int i = 0; i < job->count; i++) bytes += source_bytes(job->steps + i);
    return bytes;
}

int64_t decode_bytes(const decoding *job) {
    ptrdiff_t kept = 0;
    for (int i = 0; i < job->count; i++) {
        const convolution *c = job->steps + i;
        ptrdiff_t floats = (ptrdiff_t)c->height * c->width * c->inputs;
        kept = floats > kept ? floats : kept;
    }
    return sources_bytes(job) + aligned(4 * kept) + 4 * job->threads * own_floats(job);
}

/* Sums of pixel (y, x) go on as one pixel of the next source, or as four. */
static void write_on(const convolution *c, int y, int x, const float *sums, float *kept, element *next) {
    int times = c->shuffle ? 2 : 1, each = c->outputs / (times * times), across = c->width * times;
    for (int at = 0; at < c->outputs; at += each) {
        int part = at / each, row = y * times + part / 2, column = x * times + part % 2;
        float *keep = kept + ((ptrdiff_t)row * across + column) * each;
        element *to = next + ((ptrdiff_t)(row + 1) * (across + 2) + column + 1) * each;
        for (int j = 0; j < each; j += LANES) {
            vec sum = load(sums + at + j) + load(c->bias + at + j);
            if (c->add) sum += load(keep + j);
            if (c->keep) store(keep + j, sum);
            narrow(to + j, c->relu ? larger(all(0), sum) : sum);
        }
    }
}

static void paint(const convolution *c, int y, int x, const float *sums, uint8_t *picture) {
    for (int i = 0; i < 12; i++) { /* channel, row, column of the four pixels */
        float level = sums[i] + c->bias[i];
        level = level < -1 ? -1 : level > 1 ? 1 : level;
        ptrdiff_t pixel = (2 * y + i / 2 % 2) * (ptrdiff_t)(2 * c->width) + 2 * x + i % 2;
        picture[pixel * 3 + i / 4] = (uint8_t)rintf((level + 1) * 127.5f);
    }
}

void run_decode(const decoding *job) {
    const convolution *first = job->steps;
    int area = first->height * first->width;
    element *source = (element *)job->memory;
    for (int i = 0; i < area; i++)
        for (int at = 0; at < job->channels; at += LANES) {
            vec pixel = all(0);
            for (int c = at; c < at + LANES && c < job->channels; c++)
                pixel[c - at] = job->latent[c * area + i] * job->scale[c] + job->shift[c];
            int bordered = (i / first->width + 1) * (first->width + 2) + i % first->width + 1;
            narrow(source + (ptrdiff_t)bordered * first->inputs + at, pixel);
        }
    ptrdiff_t own = own_floats(job);
    float *apart = (float *)(job->memory + sources_bytes(job)), *kept = apart + job->threads * own;
    PARALLEL(job->threads) {
        char *here = job->memory;
        float *sums = apart + ME * own;
        for (const convolution *c = first; c < first + job->count; here += source_bytes(c++)) {
            const element *from = (element *)here;
            element *next = (element *)(here + source_bytes(c));
            int across = c->width + 2, rows = c->height * across - 2, units = c->inputs / PER_UNIT;
            int end = share(rows, ME + 1, ALL, 16);
            for (int row = share(rows, ME, ALL, 16); row < end; row += PIXELS) {
                int m = end - row < PIXELS ? end - row : PIXELS;
                const unit *a = (const unit *)(from + (ptrdiff_t)row * c->inputs);
                const unit *soon = c->weight + 96 * PANEL; /* 6 KB ahead: only the first pixels find weights far away */
                multiply((factors){a, c->weight, soon, sums, units, c->outputs, (ptrdiff_t)across * units, m,
                                   3 * units, 3, c->outputs / PANEL, 0});
                for (int r = 0; r < m; r++) {
                    int y = (row + r) / across, x = (row + r) % across;
                    if (x >= c->width) continue;
                    if (c + 1 < first + job->count)
                        write_on(c, y, x, sums + (ptrdiff_t)r * c->outputs, kept, next);
                    else
                        paint(c, y, x, sums + (ptrdiff_t)r * c->outputs, job->picture);
                }
            }
            TOGETHER
        }
        leave_tiles();
    }
}
