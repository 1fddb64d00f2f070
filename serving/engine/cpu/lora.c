/* Adds the LoRA deltas of decoding tokens to a linear's result, each row with its own adapter, in one call.
 *
 * Such a step reads every active adapter once and computes little: its floor is memory bandwidth. The weights are read
 * where they lie in host memory, in peft's own layout: a [rank, inputs], b [outputs, rank]. Sums are in 32 bits; the
 * lanes of 16 sums are added up together, so that a short rank costs no such addition of its own. Weights of 16 bits are
 * widened as they are read, so that a 32-bit engine reads half as much for an adapter that was published in bf16.
 */
#include <stdint.h>
#include <string.h>

/* The process' own OpenMP (PyTorch's): a second one would bring threads of its own. */
extern void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

#define LANES 16
#define MOST_RANK 512

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t half __attribute__((vector_size(2 * LANES), aligned(2)));
typedef uint16_t bf16;

/* One adapter's part of one linear; where `a` is null, it leaves the linear alone. */
struct place {
  const void *a, *b;
  int64_t rank;
  double scaling;
  int64_t narrow; /* a and b are bf16, whatever the engine's values are */
};

/* Row rows[k] of the batch has the adapter places[k]. */
struct batch {
  int64_t count, threads;
  const int32_t *places, *rows;
};

struct call {
  void (*row)(const struct call *, const struct place *, int64_t row);
  const struct batch *batch;
  const struct place *places;
  int64_t inputs, outputs;
  const void *x;
  void *out;
};

static inline vec load_f32(const float *at) { return *(const vec *)at; }
static inline float get_f32(float v) { return v; }
static inline float put_f32(float v) { return v; }

static inline vec load_bf16(const bf16 *at) { return (vec)(__builtin_convertvector(*(const half *)at, bits) << 16); }

static inline float get_bf16(bf16 v) {
  uint32_t wide = (uint32_t)v << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}

/* To the nearest, ties to even; a nan stays one. */
static inline bf16 put_bf16(float f) {
  uint32_t wide;
  memcpy(&wide, &f, 4);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return (bf16)((wide + 0x7fffu + ((wide >> 16) & 1)) >> 16);
}

/* Sums of neighbouring lanes: those of p in the first half, those of q in the second. */
static inline vec fold(vec p, vec q) {
  return __builtin_shufflevector(p, q, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(p, q, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* `count` vectors of 16 / count sums each become the 16 sums; count is a power of two, known when this is compiled. */
static inline __attribute__((always_inline)) vec sums(vec *v, const int count) {
  if (count >= 16) for (int i = 0; i < 8; i++) v[i] = fold(v[2 * i], v[2 * i + 1]);
  if (count >= 8) for (int i = 0; i < 4; i++) v[i] = fold(v[2 * i], v[2 * i + 1]);
  if (count >= 4) for (int i = 0; i < 2; i++) v[i] = fold(v[2 * i], v[2 * i + 1]);
  return fold(v[0], v[1]);
}

/* (values of the engine, weights of the adapter): VALUES(name) and WEIGHTS(name) read and write them. */
#define T float
#define W float
#define VALUES(name) name##_f32
#define WEIGHTS(name) name##_f32
#define N(name) name##_f32_f32
#include "lora_rows.h"
#undef W
#undef WEIGHTS
#undef N

#define W bf16
#define WEIGHTS(name) name##_bf16
#define N(name) name##_f32_bf16
#include "lora_rows.h"
#undef T
#undef VALUES
#undef N

#define T bf16
#define VALUES(name) name##_bf16
#define N(name) name##_bf16_bf16
#include "lora_rows.h"

static void share(void *data) {
  const struct call *c = data;
  const struct batch *batch = c->batch;
  int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
  for (int64_t k = batch->count * me / all; k < batch->count * (me + 1) / all; k++) {
    const struct place *place = c->places + batch->places[k];
    if (place->a) c->row(c, place, batch->rows[k]);
  }
}

static void run(struct call call) { GOMP_parallel(share, &call, (unsigned)call.batch->threads, 0); }

static void row_f32(const struct call *c, const struct place *place, int64_t row) {
  if (place->narrow) row_f32_bf16(c, place, row);
  else row_f32_f32(c, place, row);
}

/* out[rows[k]] += b . (a . x[rows[k]]) * scaling, each k with its adapter's place. x [*, inputs], out [*, outputs]. */
void add_f32(const struct batch *batch, const struct place *places, int64_t inputs, int64_t outputs, const float *x,
             float *out) {
  run((struct call){row_f32, batch, places, inputs, outputs, x, out});
}

void add_bf16(const struct batch *batch, const struct place *places, int64_t inputs, int64_t outputs, const bf16 *x,
              bf16 *out) {
  run((struct call){row_bf16_bf16, batch, places, inputs, outputs, x, out});
}
