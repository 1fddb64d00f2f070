/* Vectors of 16 lanes, values of 32 and 16 bits, and the threads of the process. */
#include <stdint.h>
#include <string.h>

/* The process' own OpenMP (PyTorch's): a second one would bring threads of its own. */
extern void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

#define LANES 16

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t half __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int32_t whole __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t bf16;

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
#if defined(__clang__)
  return __builtin_shufflevector(p, q, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(p, q, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  const whole even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(p, q, even) + __builtin_shuffle(p, q, even + 1);
#endif
}

/* `count` vectors of 16 / count sums each become the 16 sums; count is a power of two, known when this is compiled. */
static inline __attribute__((always_inline)) vec sums(vec *v, const int count) {
  if (count >= 16) for (int i = 0; i < 8; i++) v[i] = fold(v[2 * i], v[2 * i + 1]);
  if (count >= 8) for (int i = 0; i < 4; i++) v[i] = fold(v[2 * i], v[2 * i + 1]);
  if (count >= 4) for (int i = 0; i < 2; i++) v[i] = fold(v[2 * i], v[2 * i + 1]);
  return fold(v[0], v[1]);
}
