/* Adds the LoRA deltas of decoding tokens to a linear's result, each row with its own adapter, in one call.
 *
 * Such a step reads every active adapter once and computes little: its floor is memory bandwidth. The weights are read
 * where they lie in host memory, in peft's own layout: a [rank, inputs], b [outputs, rank]. Sums are in 32 bits; the
 * lanes of 16 sums are added up together, so that a short rank costs no such addition of its own. Weights of 16 bits are
 * widened as they are read, so that a 32-bit engine reads half as much for an adapter that was published in bf16.
 */
#include "vectors.h"

#define MOST_RANK 512

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

#ifdef __AVX512BF16__
#include "lora_pairs.h"
#else
#define row_pairs row_bf16_bf16
#endif

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
  run((struct call){row_pairs, batch, places, inputs, outputs, x, out});
}
