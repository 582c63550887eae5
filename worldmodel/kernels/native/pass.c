/* A pass of the causal diffusion transformer over a cache: from latents to their velocity in one call. Products take elements; what
   lies between them is float32: the residual stream, norms, rotations, softmax.

   Shapes: T frames, S tokens a frame, M = T S rows, D width, N heads, E head width, F width of the feed-forward net. */

#include "attention.h"
#include "units.h"
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

HIDDEN int tiles;
#if defined(BF16) && defined(__AMX_BF16__)
HIDDEN __thread int tiled_for;
#endif

/* Whether the tiles of AMX are used from now on, if `wanted`: the system must permit it to a process first. */
int use_tiles(int wanted) {
#if defined(BF16) && defined(__AMX_BF16__) && defined(__linux__)
    tiles = wanted && !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
#else
    (void)wanted;
#endif
    return tiles;
}

/* Bytes of an element: what the library was built for. */
int element_bytes(void) { return sizeof(element); }

/* A linear layer: panels of elements, float32 bias. Inputs are a multiple of 16 units, outputs of 16. */
typedef struct {
    const unit *weight;
    const float *bias;
    int inputs, outputs;
} layer;

/* Tables and gains are float32: (6, D), (D,), (D,). */
typedef struct {
    const float *modulation, *gain_q, *gain_k;
    layer qkv, out, ffn_in, ffn_out;
} block;

typedef struct {
    int dim, heads, layers, activation; /* 0 GELU (tanh), 1 squared ReLU, 2 SiLU */
    int patch, channels, velocities;    /* of latents that come in, and that go out */
    float eps;
    const block *blocks;
    const float *head_modulation; /* (2, D) */
    layer embed, condition, head;
} network;

/* A run of rows that see the same: `rows` rows from `first` on write their keys and values at token `place` of the store and see
   tokens `begin` to `place + rows`. With `moved` (rows,) they are copied to those tokens behind it, before the next group looks. */
typedef struct {
    int first, rows, begin, place;
    const int64_t *moved;
} group;

typedef struct {
    int frames, height, width, shown; /* of latents; how many of the last frames' velocities are wanted, 0: only keys and values */
    const float *latents, *told;      /* (T, C, H, W), (T, D): what the network is told of the frames */
    const float *cos, *sin;           /* (M, E/2) */
    float *velocity;                  /* (shown, C, H, W) */
    element *const *stores;           /* keys and values of every layer, (N, length, E) */
    int64_t length;
    const group *groups;
    int count, threads;
    char *memory; /* `pass_bytes` of it, aligned to 64 */
} pass;

typedef struct {
    float *x, *qkv, *out, *modulation; /* (M, D), (M, 3 D), (M, head), (T, 6, D) */
    float *cos, *sin;                  /* (M, E): as long as what they turn, the sine with its sign */
    element *in, *h, *q, *wide;        /* (M, patch), (M, D), (N, M, E), (M, F) */
    float *apart;                      /* what each thread has for itself */
    ptrdiff_t own;                     /* floats of it */
} scratch;

static int rows_of(const network *net, const pass *job) {
    return job->frames * (job->height / net->patch) * (job->width / net->patch);
}

static ptrdiff_t carve(scratch *s, const network *net, const pass *job) {
    int width = net->dim / net->heads;
    ptrdiff_t at = 0, m = rows_of(net, job), e = sizeof(element);
    s->own = aligned(4 * attending_floats((int)m, width)) / 4;
    if (s->own < m * COLUMNS * PANEL) s->own = m * COLUMNS * PANEL;
    if (s->own < net->embed.inputs) s->own = net->embed.inputs;
    struct {
        void *to;
        ptrdiff_t bytes;
    } parts[] = {
        {&s->x, 4 * m * net->dim},
        {&s->qkv, 12 * m * net->dim},
        {&s->out, 4 * m * net->head.outputs},
        {&s->modulation, (ptrdiff_t)24 * job->frames * net->dim},
        {&s->cos, 4 * m * width},
        {&s->sin, 4 * m * width},
        {&s->in, e * m * net->embed.inputs},
        {&s->h, e * m * net->dim},
        {&s->q, e * m * net->dim},
        {&s->wide, e * m * net->blocks->ffn_in.outputs},
        {&s->apart, 4 * job->threads * s->own},
    };
    for (unsigned i = 0; i < sizeof parts / sizeof *parts; at += aligned(parts[i++].bytes)) {
        char *place = job->memory + at;
        memcpy(parts[i].to, &place, sizeof place);
    }
    return at;
}

/* Bytes that `run_pass` needs to work in. */
int64_t pass_bytes(const network *net, const pass *job) {
    scratch unused;
    return carve(&unused, net, job);
}

/* Layer norm without affine, then (1 + scale) and shift: sums of two tables (2, D), of which the second has its rows `next`
   apart. */
static void modulate(const network *net, const float *x, const float *table, const float *shared, int next, element *to) {
    int d = net->dim;
    vec sum = all(0), squares = all(0);
    for (int j = 0; j < d; j += LANES) sum += load(x + j);
    float mean = total(sum) / d;
    for (int j = 0; j < d; j += LANES) {
        vec off = load(x + j) - mean;
        squares += off * off;
    }
    float scale = 1 / sqrtf(total(squares) / d + net->eps);
    for (int j = 0; j < d; j += LANES) {
        vec shift = load(table + j) + load(shared + j), gain = load(table + d + j) + load(shared + next + j) + 1.f;
        narrow(to + j, (load(x + j) - mean) * scale * gain + shift);
    }
}

/* RMS norm with gain over the width, rotation of channel pairs: a row of all heads -> `stride` elements from head to head. */
static void norm_rope(const network *net, const float *x, const float *gain, float scale, const float *cos, const float *sin,
                      element *to, ptrdiff_t stride) {
    int d = net->dim, width = d / net->heads;
    vec squares = all(0);
    for (int j = 0; j < d; j += LANES) squares += load(x + j) * load(x + j);
    scale /= sqrtf(total(squares) / d + net->eps);
    for (int n = 0; n < net->heads; n++)
        for (int j = 0; j < width; j += LANES) {
            vec y = load(x + n * width + j) * load(gain + n * width + j) * scale;
            vec swapped = SWAPPED(y);
            narrow(to + n * stride + j, y * load(cos + j) + swapped * load(sin + j));
        }
}

INLINE vec activated(int kind, vec x) {
    if (kind == 1) {
        ints positive = x > 0;
        x = (vec)((ints)x & positive);
        return x * x;
    }
    vec y = kind == 0 ? 1.5957691f * (x + 0.044715f * x * x * x) : x * 1.f;
    return x / (1.f + exp2v(larger(all(-87.f), y) * -1.4426950f)); /* 2^126 is infinite enough */
}

enum { KEEP, ACTIVATE, ADD };

typedef struct {
    const network *net;
    const pass *job;
    scratch s;
    int m, tokens, me, all;
    float *own;
} work;

/* This thread's columns of a linear layer. KEEP: to (m, outputs) float32. ACTIVATE: to elements. ADD: gated by the sum of two
   tables, of which the second differs from frame to frame, to the residual stream. */
static void linear(const work *w, int what, const layer *by, int m, const element *x, void *to, const float *gate,
                   const float *shared) {
    int units = by->inputs / PER_UNIT, panels = by->outputs / PANEL, wide = COLUMNS * PANEL;
    int end = share(panels, w->me + 1, w->all, COLUMNS);
    for (int p = share(panels, w->me, w->all, COLUMNS); p < end; p += COLUMNS) {
        int columns = end - p < COLUMNS ? end - p : COLUMNS, at = p * PANEL;
        const unit *weight = by->weight + (ptrdiff_t)p * units * PANEL;
        const unit *after = weight + (ptrdiff_t)columns * units * PANEL;
        multiply((factors){(const unit *)x, weight, after, w->own, units, wide, 0, m, units, 1, columns, 0});
        for (int r = 0; r < m; r++)
            for (int j = 0; j < columns * PANEL; j += LANES) {
                vec y = load(w->own + r * wide + j) + load(by->bias + at + j);
                ptrdiff_t place = (ptrdiff_t)r * by->outputs + at + j;
                if (what == KEEP) {
                    store((float *)to + place, y);
                } else if (what == ACTIVATE) {
                    narrow((element *)to + place, activated(w->net->activation, y));
                } else {
                    vec open = load(gate + at + j) + load(shared + (ptrdiff_t)(r / w->tokens) * 6 * by->outputs + at + j);
                    store((float *)to + place, load((float *)to + place) + y * open);
                }
            }
    }
}

/* Rows of this thread, of `of`. */
#define FOR_ROWS(r, of) for (int r = share(of, w->me, w->all, 1); r < share(of, w->me + 1, w->all, 1); r++)

/* All rows, for the attention (`of` 0) or the feed-forward net (3) of a block with this table. */
static void modulate_all(const work *w, const float *table, int of) {
    int d = w->net->dim;
    FOR_ROWS(r, w->m) {
        const float *shared = w->s.modulation + ((ptrdiff_t)(r / w->tokens) * 6 + of) * d;
        modulate(w->net, w->s.x + (ptrdiff_t)r * d, table + of * d, shared, d, w->s.h + (ptrdiff_t)r * d);
    }
}

/* Latents as rows of patches, what the frames are told, and the tables of positions. */
static void begin(const work *w) {
    const network *net = w->net;
    const pass *job = w->job;
    int p = net->patch, across = job->width / p, width = net->dim / net->heads, d = net->dim;
    FOR_ROWS(r, w->m) {
        int frame = r / w->tokens, y = r % w->tokens / across * p, x = r % across * p, n = 0;
        float *line = w->own;
        memset(line, 0, sizeof(float) * net->embed.inputs);
        for (int c = 0; c < net->channels; c++) {
            const float *from = job->latents + (((ptrdiff_t)frame * net->channels + c) * job->height + y) * job->width + x;
            for (int i = 0; i < p * p; i++) line[n++] = from[i / p * job->width + i % p];
        }
        for (int j = 0; j < net->embed.inputs; j += LANES) narrow(w->s.in + (ptrdiff_t)r * net->embed.inputs + j, load(line + j));
        for (int j = 0; j < width; j++) {
            w->s.cos[r * width + j] = job->cos[r * (width / 2) + j / 2];
            w->s.sin[r * width + j] = job->sin[r * (width / 2) + j / 2] * (j % 2 ? 1 : -1);
        }
    }
    FOR_ROWS(t, job->frames)
    for (int j = 0; j < d; j += LANES) narrow(w->s.h + t * d + j, activated(2, load(job->told + t * d + j)));
    TOGETHER
    linear(w, KEEP, &net->embed, w->m, w->s.in, w->s.x, 0, 0);
    linear(w, KEEP, &net->condition, job->frames, w->s.h, w->s.modulation, 0, 0);
    TOGETHER
}

/* Velocity of the frames that are shown. */
static void end(const work *w) {
    const network *net = w->net;
    const pass *job = w->job;
    int p = net->patch, d = net->dim, across = job->width / p, from = job->frames - job->shown;
    FOR_ROWS(r, w->m) {
        ptrdiff_t row = (ptrdiff_t)r * d;
        modulate(net, w->s.x + row, net->head_modulation, job->told + (ptrdiff_t)(r / w->tokens) * d, 0, w->s.h + row);
    }
    TOGETHER
    linear(w, KEEP, &net->head, w->m, w->s.h, w->s.out, 0, 0);
    TOGETHER
    FOR_ROWS(r, w->m) {
        int frame = r / w->tokens - from, y = r % w->tokens / across * p, x = r % across * p;
        const float *line = w->s.out + (ptrdiff_t)r * net->head.outputs;
        for (int i = 0; i < p * p && frame >= 0; i++) {
            float *to = job->velocity + ((ptrdiff_t)frame * net->velocities * job->height + y + i / p) * job->width + x + i % p;
            for (int c = 0; c < net->velocities; c++) to[(ptrdiff_t)c * job->height * job->width] = *line++;
        }
    }
}

/* Queries, keys and values of a group, what it sees, and where its keys and values go on. */
static void look(const work *w, const block *b, const group *now, element *keys, element *values, int wanted) {
    const network *net = w->net;
    int d = net->dim, heads = net->heads, width = d / heads, m = w->m;
    ptrdiff_t length = w->job->length;
    FOR_ROWS(i, now->rows) {
        ptrdiff_t r = now->first + i, place = (ptrdiff_t)(now->place + i) * width;
        const float *line = w->s.qkv + r * 3 * d, *c = w->s.cos + r * width, *z = w->s.sin + r * width;
        norm_rope(net, line, b->gain_q, 1.4426950f / sqrtf(width), c, z, w->s.q + r * width, (ptrdiff_t)m * width);
        norm_rope(net, line + d, b->gain_k, 1, c, z, keys + place, length * width);
        for (int j = 0; j < d; j += LANES)
            narrow(values + place + j / width * (length * width) + j % width, load(line + 2 * d + j));
    }
    TOGETHER
    /* heads one behind the other are one run of rows, of which every thread takes its share */
    int from = share(heads * now->rows, w->me, w->all, ROWS), to = share(heads * now->rows, w->me + 1, w->all, ROWS);
    for (int rows; wanted && from < to; from += rows) {
        int n = from / now->rows, i = from % now->rows, seen = now->place + now->rows - now->begin;
        rows = now->rows - i < to - from ? now->rows - i : to - from;
        ptrdiff_t r = now->first + i, start = n * length * width + (ptrdiff_t)now->begin * width;
        attend(rows, width, w->s.q + ((ptrdiff_t)n * m + r) * width, keys + start, values + start, seen, length * width,
               attending_in(w->own, m, width), w->s.h + r * d + n * width, d);
    }
    if (!now->moved) return;
    TOGETHER
    FOR_ROWS(i, 2 * heads) {
        element *kept = (i % 2 ? values : keys) + i / 2 * length * width;
        for (int j = 0; j < now->rows; j++)
            memcpy(kept + now->moved[j] * width, kept + (ptrdiff_t)(now->place + j) * width, width * sizeof(element));
    }
    TOGETHER
}

void run_pass(const network *net, const pass *job) {
    work all = {.net = net, .job = job, .m = rows_of(net, job)};
    carve(&all.s, net, job);
    all.tokens = all.m / job->frames;
    PARALLEL(job->threads) {
        work mine = all, *w = &mine;
        const scratch *s = &w->s;
        int d = net->dim;
        w->me = ME, w->all = ALL, w->own = s->apart + w->me * s->own;
        begin(w);
        for (int layer = 0; layer < net->layers; layer++) {
            const block *b = net->blocks + layer;
            const float *table = b->modulation, *shared = s->modulation;
            int wanted = job->shown || layer + 1 < net->layers;
            modulate_all(w, b->modulation, 0);
            TOGETHER
            linear(w, KEEP, &b->qkv, w->m, s->h, s->qkv, 0, 0);
            TOGETHER
            for (int g = 0; g < job->count; g++)
                look(w, b, job->groups + g, job->stores[2 * layer], job->stores[2 * layer + 1], wanted);
            TOGETHER
            if (!wanted) continue;
            linear(w, ADD, &b->out, w->m, s->h, s->x, table + 2 * d, shared + 2 * d);
            TOGETHER
            modulate_all(w, b->modulation, 3);
            TOGETHER
            linear(w, ACTIVATE, &b->ffn_in, w->m, s->h, s->wide, 0, 0);
            TOGETHER
            linear(w, ADD, &b->ffn_out, w->m, s->wide, s->x, table + 5 * d, shared + 5 * d);
            TOGETHER
        }
        if (job->shown) end(w);
        leave_tiles();
    }
}
