/* What a decode step computes beside its matrix products: norms, gates, and attention of each row over its own keys and
 * values (see kv.py). Sums are in 32 bits.
 */
#include "vectors.h"

#define MOST_HEAD 256
#define HEADS_AT_ONCE 8
#define KEYS_AT_ONCE 64
#define NEVER (-1e30f)

static inline vec where(whole yes, vec a, vec b) { return (vec)(((whole)a & yes) | ((whole)b & ~yes)); }

/* e^x between e^-87 and e^88, relative error below 2e-7; the polynomial of Cephes' expf (netlib.org/cephes). */
static inline vec exponential(vec x) {
  x = where(x < -87.0f, (vec){0} - 87.0f, x);
  x = where(x > 88.0f, (vec){0} + 88.0f, x);
  vec n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* to the nearest whole number */
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vec)((__builtin_convertvector(n, whole) + 127) << 23);
}

static inline float total(vec v) {
  float sum = 0;
  for (int n = 0; n < LANES; n++) sum += v[n];
  return sum;
}

/* Rows of keys and values. Row r is packed as token r; its keys are lines from places[r] * heads on, caps[r] a head. */
struct rows {
  int64_t count, threads;
  const int64_t *places, *caps, *lengths;
};

struct attention {
  const struct rows *rows;
  const void *q, *k, *v;
  void *keys, *values, *out;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head; /* strides in values */
  int64_t heads, groups, size;                         /* key-value heads, query heads of each, values of a head */
  int64_t window, writes;                              /* 0: looks at all; whether k and v are put in their places */
  float scale, softcap;                                /* 0: none */
};

struct attending {
  const struct attention *a;
  int64_t next;
};

struct gate {
  const void *gate, *up;
  void *out;
  int64_t count;
};

#define T float
#define N(name) name##_f32
#include "decode_rows.h"
#undef T
#undef N

#define T bf16
#define N(name) name##_bf16
#include "decode_rows.h"
