/* One row's delta in bf16 by products of pairs, summed in 32 bits (AVX512-BF16): half the instructions of lora_rows.h, whose
 * functions take what is left over. What lora_A gives is rounded to bf16 for lora_B, as peft's own product is.
 */
#include <immintrin.h>

#define PAIRED (2 * LANES)

static inline vec pairs(vec sum, const bf16 *x, const bf16 *w) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_loadu_si512(w));
}

/* 16 outputs: `count` vectors of 16 / count outputs each, for a rank of 32 / (16 / count). */
static inline __attribute__((always_inline)) vec few(const bf16 *s, const bf16 *b, const int count) {
  vec sum[8];
  for (int n = 0; n < count; n++) sum[n] = pairs((vec){0}, s, b + n * PAIRED);
  return sums(sum, count);
}

static void row_pairs(const struct call *c, const struct place *p, int64_t number) {
  const bf16 *row = (const bf16 *)c->x + number * c->inputs, *a = p->a, *b = p->b;
  bf16 *out = (bf16 *)c->out + number * c->outputs;
  int64_t rank = p->rank, inputs = c->inputs, outputs = c->outputs, o = 0;
  if (inputs % PAIRED || (rank != 8 && rank != LANES && rank % PAIRED)) {
    row_bf16_bf16(c, p, number);
    return;
  }
  float shrunk[MOST_RANK];
  bf16 s[MOST_RANK];
  for (int64_t r = 0; r < rank; r += 8) {
    vec sum[8] = {0};
    for (int64_t i = 0; i < inputs; i += PAIRED)
      for (int n = 0; n < 8; n++) sum[n] = pairs(sum[n], row + i, a + (r + n) * inputs + i);
    vec folded = sums(sum, 8); /* two lanes a rank */
    for (int n = 0; n < 8; n++) shrunk[r + n] = folded[2 * n] + folded[2 * n + 1];
  }
  int64_t filled = rank < PAIRED ? PAIRED : rank;
  for (int64_t r = 0; r < filled; r++) s[r] = put_bf16(shrunk[r % rank] * (float)p->scaling);
  for (; o + LANES <= outputs; o += LANES) {
    const bf16 *lines = b + o * rank;
    vec delta;
    if (rank == 8) delta = few(s, lines, 4);
    else if (rank == LANES) delta = few(s, lines, 8);
    else {
      vec sum[LANES] = {0};
      for (int64_t r = 0; r < rank; r += PAIRED)
        for (int n = 0; n < LANES; n++) sum[n] = pairs(sum[n], s + r, lines + n * rank + r);
      delta = sums(sum, LANES);
    }
    add16_bf16_bf16(out + o, delta);
  }
  for (; o < outputs; o++) {
    float sum = 0;
    for (int64_t r = 0; r < rank; r++) sum += get_bf16(s[r]) * get_bf16(b[o * rank + r]);
    out[o] = put_bf16(get_bf16(out[o]) + sum);
  }
}
