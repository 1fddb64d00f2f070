/* One row's delta, for values of type T and weights of type W; every function is N(name). See lora.c. */

static inline float N(dot)(const T *x, const W *w, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; i++) sum += VALUES(get)(x[i]) * WEIGHTS(get)(w[i]);
  return sum;
}

/* shrunk[r] = scaling * (row . a[r]) */
static void N(shrink)(const T *row, const struct place *p, int64_t inputs, float *shrunk) {
  const W *a = p->a;
  int64_t r = 0, whole = inputs - inputs % LANES;
  for (; r + LANES <= p->rank; r += LANES) {
    vec sum[LANES] = {0};
    for (int64_t i = 0; i < whole; i += LANES) {
      vec x = VALUES(load)(row + i);
      for (int n = 0; n < LANES; n++) sum[n] += x * WEIGHTS(load)(a + (r + n) * inputs + i);
    }
    *(vec *)(shrunk + r) = sums(sum, LANES);
  }
  for (; r < p->rank; r++) {
    vec sum = {0};
    for (int64_t i = 0; i < whole; i += LANES) sum += VALUES(load)(row + i) * WEIGHTS(load)(a + r * inputs + i);
    shrunk[r] = 0;
    for (int n = 0; n < LANES; n++) shrunk[r] += sum[n];
  }
  for (r = 0; r < p->rank; r++) {
    if (whole < inputs) shrunk[r] += N(dot)(row + whole, a + r * inputs + whole, inputs - whole);
    shrunk[r] *= (float)p->scaling;
  }
}

static inline void N(add16)(T *row, vec delta) {
  for (int n = 0; n < LANES; n++) row[n] = VALUES(put)(VALUES(get)(row[n]) + delta[n]);
}

/* As `expand` for 16 outputs at a time, `rank` of 4 or 8: a vector holds the lines of several outputs. */
static inline __attribute__((always_inline)) int64_t N(expand_short)(
    const float *shrunk, const W *b, const int rank, int64_t outputs, T *row) {
  vec s;
  for (int n = 0; n < LANES; n++) s[n] = shrunk[n % rank];
  int64_t o = 0;
  for (; o + LANES <= outputs; o += LANES) {
    vec sum[8];
    for (int n = 0; n < rank; n++) sum[n] = s * WEIGHTS(load)(b + o * rank + n * LANES);
    N(add16)(row + o, sums(sum, rank));
  }
  return o;
}

/* As `expand` for 16 outputs at a time, a rank that divides by 16. */
static int64_t N(expand_long)(const float *shrunk, const W *b, int64_t rank, int64_t outputs, T *row) {
  int64_t o = 0;
  for (; o + LANES <= outputs; o += LANES) {
    vec sum[LANES], s = *(const vec *)shrunk;
    for (int n = 0; n < LANES; n++) sum[n] = s * WEIGHTS(load)(b + (o + n) * rank);
    for (int64_t r = LANES; r < rank; r += LANES) {
      s = *(const vec *)(shrunk + r);
      for (int n = 0; n < LANES; n++) sum[n] += s * WEIGHTS(load)(b + (o + n) * rank + r);
    }
    N(add16)(row + o, sums(sum, LANES));
  }
  return o;
}

/* row[o] += b[o] . shrunk */
static void N(expand)(const float *shrunk, const struct place *p, int64_t outputs, T *row) {
  const W *b = p->b;
  int64_t o = 0, rank = p->rank;
  if (rank % LANES == 0) o = N(expand_long)(shrunk, b, rank, outputs, row);
  else if (rank == 8) o = N(expand_short)(shrunk, b, 8, outputs, row);
  else if (rank == 4) o = N(expand_short)(shrunk, b, 4, outputs, row);
  for (; o < outputs; o++) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t r = 0; r < rank; r++) sum += shrunk[r] * WEIGHTS(get)(b[o * rank + r]);
    row[o] = VALUES(put)(VALUES(get)(row[o]) + sum);
  }
}

/* One row of the batch. */
static void N(row)(const struct call *c, const struct place *place, int64_t row) {
  float shrunk[MOST_RANK];
  N(shrink)((const T *)c->x + row * c->inputs, place, c->inputs, shrunk);
  N(expand)(shrunk, place, c->outputs, (T *)c->out + row * c->outputs);
}
