/* decode.c for tokens of type T; every function is N(name). */

static inline void N(store)(T *at, vec v) {
  for (int n = 0; n < LANES; n++) at[n] = N(put)(v[n]);
}

/* One key-value head of one row, `groups` query heads at most 8 at a time; softmax is kept up to date block by block. */
static void N(attend_head)(const struct attention *a, int64_t row, int64_t head, int64_t first, int64_t groups) {
  const struct rows *rows = a->rows;
  int64_t size = a->size, length = rows->lengths[row];
  int64_t line = rows->places[row] * a->heads + head * rows->caps[row];
  const T *keys = (const T *)a->keys + line * size, *values = (const T *)a->values + line * size;
  int64_t begin = a->window && length > a->window ? length - a->window : 0;
  float q[HEADS_AT_ONCE][MOST_HEAD], mixed[HEADS_AT_ONCE][MOST_HEAD], score[HEADS_AT_ONCE][KEYS_AT_ONCE];
  float most[HEADS_AT_ONCE], sum[HEADS_AT_ONCE];
  for (int64_t g = 0; g < groups; g++) {
    const T *from = (const T *)a->q + row * a->q_row + (head * a->groups + first + g) * a->q_head;
    for (int64_t d = 0; d < size; d++) q[g][d] = N(get)(from[d]) * a->scale, mixed[g][d] = 0;
    most[g] = NEVER, sum[g] = 0;
  }
  for (int64_t s = begin; s < length; s += KEYS_AT_ONCE) {
    int64_t count = length - s < KEYS_AT_ONCE ? length - s : KEYS_AT_ONCE;
    for (int64_t g = 0; g < groups; g++) {
      float highest = most[g];
      for (int64_t n = 0; n < count; n += LANES) {
        vec part[LANES] = {0};
        int64_t left = count - n < LANES ? count - n : LANES;
        const T *key[LANES];
        for (int i = 0; i < LANES; i++) key[i] = keys + (s + n + (i < left ? i : 0)) * size;
        for (int64_t d = 0; d < size; d += LANES) {
          vec own = load_f32(&q[g][d]);
          for (int i = 0; i < LANES; i++) part[i] += own * N(load)(key[i] + d);
        }
        vec found = sums(part, LANES);
        if (a->softcap) found = a->softcap - 2 * a->softcap / (exponential(found * (2 / a->softcap)) + 1);
        for (int64_t i = left; i < LANES; i++) found[i] = NEVER;
        for (int i = 0; i < LANES; i++) highest = found[i] > highest ? found[i] : highest;
        *(vec *)&score[g][n] = found;
      }
      float kept = exponential((vec){0} + (most[g] - highest))[0];
      vec weights = {0};
      for (int64_t n = 0; n < count; n += LANES) {
        vec weight = exponential(load_f32(&score[g][n]) - highest);
        for (int64_t i = count - n; i < LANES; i++) weight[i] = 0;
        weights += weight;
        *(vec *)&score[g][n] = weight;
      }
      sum[g] = sum[g] * kept + total(weights);
      most[g] = highest;
      for (int64_t d = 0; d < size; d += LANES) *(vec *)&mixed[g][d] *= kept;
    }
    for (int64_t d = 0; d < size; d += LANES) {
      vec own[HEADS_AT_ONCE];
      for (int64_t g = 0; g < groups; g++) own[g] = load_f32(&mixed[g][d]);
      for (int64_t n = 0; n < count; n++) {
        vec value = N(load)(values + (s + n) * size + d);
        for (int64_t g = 0; g < groups; g++) own[g] += score[g][n] * value;
      }
      for (int64_t g = 0; g < groups; g++) *(vec *)&mixed[g][d] = own[g];
    }
  }
  for (int64_t g = 0; g < groups; g++) {
    T *to = (T *)a->out + (row * a->heads * a->groups + head * a->groups + first + g) * size;
    for (int64_t d = 0; d < size; d += LANES) N(store)(to + d, load_f32(&mixed[g][d]) / sum[g]);
  }
}

static void N(attend_share)(void *data) {
  struct attending *work = data;
  const struct attention *a = work->a;
  const struct rows *rows = a->rows;
  int64_t task;
  while ((task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED)) < rows->count * a->heads) {
    int64_t row = task / a->heads, head = task % a->heads;
    if (a->writes) {
      int64_t line = rows->places[row] * a->heads + head * rows->caps[row] + rows->lengths[row] - 1;
      const T *k = (const T *)a->k + row * a->k_row + head * a->k_head;
      const T *v = (const T *)a->v + row * a->v_row + head * a->v_head;
      memcpy((T *)a->keys + line * a->size, k, a->size * sizeof(T));
      memcpy((T *)a->values + line * a->size, v, a->size * sizeof(T));
    }
    for (int64_t g = 0; g < a->groups; g += HEADS_AT_ONCE)
      N(attend_head)(a, row, head, g, a->groups - g < HEADS_AT_ONCE ? a->groups - g : HEADS_AT_ONCE);
  }
}

/* out [rows, heads * groups, size]; the newest key of a row is the last that it looks at. */
void N(attend)(const struct attention *a) {
  struct attending work = {a, 0};
  GOMP_parallel(N(attend_share), &work, (unsigned)a->rows->threads, 0);
}

/* out = weight * T(x / sqrt(mean(x^2) + eps)), row by row: T5's layer norm, as transformers computes it. */
void N(rms_norm)(const T *x, const T *weight, T *out, int64_t count, int64_t size, double eps) {
  for (int64_t row = 0; row < count; row++, x += size, out += size) {
    vec squares = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += N(load)(x + i) * N(load)(x + i);
    float sum = total(squares);
    for (; i < size; i++) sum += N(get)(x[i]) * N(get)(x[i]);
    float factor = 1 / __builtin_sqrtf(sum / size + (float)eps);
    for (i = 0; i < size; i++) out[i] = N(put)(N(get)(weight[i]) * N(get)(N(put)(N(get)(x[i]) * factor)));
  }
}

static void N(gate_share)(void *data) {
  const struct gate *work = data;
  int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
  int64_t first = work->count * me / all / LANES * LANES, stop = work->count * (me + 1) / all / LANES * LANES;
  if (me + 1 == all) stop = work->count;
  const T *gate = work->gate, *up = work->up;
  T *out = work->out;
  for (int64_t i = first; i < stop; i += LANES) {
    T g[LANES], u[LANES], o[LANES];
    int64_t left = stop - i < LANES ? stop - i : LANES;
    if (left < LANES) memset(g, 0, sizeof g), memset(u, 0, sizeof u);
    memcpy(g, gate + i, left * sizeof(T)), memcpy(u, up + i, left * sizeof(T));
    vec x = N(load)(g);
    N(store)(o, x / (1 + exponential((vec){0} - x)));
    N(store)(o, N(load)(o) * N(load)(u));
    memcpy(out + i, o, left * sizeof(T));
  }
}

/* out = T(silu(gate)) * up, `count` values. */
void N(gated)(const T *gate, const T *up, T *out, int64_t count, int64_t threads) {
  struct gate work = {gate, up, out, count};
  GOMP_parallel(N(gate_share), &work, (unsigned)threads, 0);
}
