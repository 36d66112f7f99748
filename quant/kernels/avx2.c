/* Products of int8 codes by AVX2, and what makes such codes; `quant.kernels.avx2` compiles and calls it.

   A word is 32 bits of terms that are multiplied and added up at once: four codes in pairs, or two that are widened to
   16 bits. The right matrix is packed in panels of 16 rows, the words of a panel's rows side by side; so is the left
   one if it is widened, in panels of 24. A tile of 6 x 16 sums stays in registers, while a word of each of its 6 left
   rows meets the words of 16 right ones.

   AVX2 multiplies unsigned by signed bytes and adds up two products in 16 bits, with saturation. So `largest`, the size
   of the largest right code, is added to the right codes, which are 0 to 2 * largest then; what that adds to a sum,
   `largest` times the sum of the left row, is taken off at the end. The left codes being -128 at least, a pair of
   products is within 512 * largest of 0, and 64 / largest pairs fit 16 bits before they are added up in 32.

   Dimensions: N left rows, O right rows, K terms of a row, W words of them. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum {
    PAIRS = 4, /* terms of a word */
    LARGEST = 64, /* right code of them */
    WIDE = 2,  /* terms of a word that are widened */
    ROWS = 6,  /* of a tile */
    LEFT_PANEL = 24,
    RIGHT_PANEL = 16,
    DEPTH = 128, /* words: a right panel's, 8 KiB, stay in the first cache */
    BLOCK = 96,  /* left rows that they meet there, which stay in the second */
    COLUMNS = 64, /* that are rounded at once, whole lines of the caches; they are read twice */
};

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const int8_t *codes;
    long by_row, by_term; /* steps in memory */
    long rows;
} matrix;

typedef struct {
    matrix left, right;
    long K;
    void *left_packed, *right_packed; /* whole panels of words, aligned; NULL where none are packed */
    int32_t *left_sums;               /* [N], of codes */
    void *result;                     /* [N, O], fp32 of pairs, else int32 */
} task;

#define SIGNS _mm256_set1_epi8((char)128)
#define LOWEST _mm256_set1_epi8(3)

INLINE long smaller(long a, long b) { return a < b ? a : b; }

INLINE __m128i load(const int8_t *codes) { return _mm_loadl_epi64((const __m128i *)codes); }

/* Of packed bytes the codes of one quarter of the rows, with 1 added. */
INLINE __m256i codes_of(__m256i bytes, long quarter)
{
    return _mm256_and_si256(_mm256_srli_epi32(_mm256_xor_si256(bytes, SIGNS), 2 * quarter), LOWEST);
}

/* A word of each of 8 rows whose codes, with 1 added, lie in 2 bits: a byte has one of each quarter of the rows. */
INLINE __m256i words_in_bits(matrix from, long row, long term, long K)
{
    const long in_quarter = from.rows / 4, quarter = row / in_quarter, first = row % in_quarter;
    if (row + 8 <= from.rows && first + 8 <= in_quarter && term + PAIRS <= K) {
        const __m256i rows = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i steps = _mm256_mullo_epi32(rows, _mm256_set1_epi32((int)K));
        return codes_of(_mm256_i32gather_epi32((const int *)(from.codes + first * K + term), steps, 1), quarter);
    }
    int8_t some[8 * PAIRS] __attribute__((aligned(32))) = {0};
    for (long i = 0; i < smaller(8, from.rows - row); i++)
        for (long k = 0; k < smaller(PAIRS, K - term); k++)
            some[i * PAIRS + k] = ((uint8_t)from.codes[(row + i) % in_quarter * K + term + k] ^ 128) >>
                                      2 * ((row + i) / in_quarter) & 3;
    return *(const __m256i *)some;
}

/* A word of each of 8 rows from `row` and `term` on; 0 where there are no codes. */
INLINE __m256i words_of(matrix from, long row, long term, long K, int terms)
{
    const int8_t *const codes = from.codes + row * from.by_row + term * from.by_term;
    const int is_whole = row + 8 <= from.rows && term + terms <= K;
    if (is_whole && from.by_row == 1) {
        const __m128i low = _mm_unpacklo_epi8(load(codes), load(codes + from.by_term));
        if (terms == WIDE)
            return _mm256_cvtepi8_epi16(low);
        const __m128i high = _mm_unpacklo_epi8(load(codes + 2 * from.by_term), load(codes + 3 * from.by_term));
        return _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
    }
    if (is_whole && from.by_term == 1 && terms == PAIRS) {
        const __m256i rows = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i steps = _mm256_mullo_epi32(rows, _mm256_set1_epi32((int)from.by_row));
        return _mm256_i32gather_epi32((const int *)codes, steps, 1);
    }
    int8_t some[8 * PAIRS] __attribute__((aligned(32))) = {0};
    for (long i = 0; i < smaller(8, from.rows - row); i++)
        for (long k = 0; k < smaller(terms, K - term); k++)
            some[i * terms + k] = codes[i * from.by_row + k * from.by_term];
    return terms == PAIRS ? *(const __m256i *)some : _mm256_cvtepi8_epi16(*(const __m128i *)some);
}

/* A thread's part of packing a matrix, with `shift` added to each code. */
INLINE void pack(matrix from, int panel, long K, int terms, int in_bits, int shift, __m256i *packed)
{
    const long W = (K + terms - 1) / terms;
    const __m256i shifts = _mm256_set1_epi8((char)shift);
    #pragma omp for collapse(2) schedule(static) nowait
    for (long begin = 0; begin < W; begin += 32) /* few rows in memory at a time */
        for (long row = 0; row < from.rows; row += panel)
            for (long word = begin; word < smaller(W, begin + 32); word++)
                for (int i = 0; i < panel / 8; i++) {
                    const __m256i words = in_bits ? words_in_bits(from, row + 8 * i, word * terms, K)
                                                  : words_of(from, row + 8 * i, word * terms, K, terms);
                    packed[row / 8 * W + word * (panel / 8) + i] = _mm256_add_epi8(words, shifts);
                }
}

/* Add up the products of words of 6 left rows, `step` apart, and of a right panel; sums [ROWS, RIGHT_PANEL]. */
INLINE void add_tile(const int32_t *left[ROWS], int step, const __m256i *right, long depth, long spill, int terms,
                     __m256i *sums)
{
    for (long begin = 0; begin < depth; begin += spill) {
        __m256i tile[ROWS][2];
        for (int row = 0; row < ROWS; row++)
            tile[row][0] = tile[row][1] = _mm256_setzero_si256();
        for (long word = begin; word < smaller(depth, begin + spill); word++)
            for (int row = 0; row < ROWS; row++) {
                const __m256i x = _mm256_set1_epi32(left[row][word * step]);
                for (int half = 0; half < 2; half++) {
                    const __m256i y = right[2 * word + half];
                    /* As assembly, because GCC copies the sums otherwise, and has no registers for that. */
                    if (terms == PAIRS)
                        __asm__("vpaddw %1, %0, %0" : "+x"(tile[row][half]) : "x"(_mm256_maddubs_epi16(y, x)));
                    else
                        __asm__("vpaddd %1, %0, %0" : "+x"(tile[row][half]) : "x"(_mm256_madd_epi16(y, x)));
                }
            }
        for (int row = 0; row < ROWS; row++)
            for (int half = 0; half < 2; half++) {
                const __m256i found = tile[row][half];
                const __m256i more = terms == PAIRS ? _mm256_madd_epi16(found, _mm256_set1_epi16(1)) : found;
                sums[2 * row + half] = _mm256_add_epi32(sums[2 * row + half], more);
            }
    }
}

/* Copy numbers of 4 bytes, mostly a panel's. */
INLINE void copy_row(void *to, const void *from, long count)
{
    if (count == RIGHT_PANEL)
        memcpy(to, from, RIGHT_PANEL * 4);
    else
        memcpy(to, from, count * 4);
}

/* A thread's part of the sums of left rows that lie one after another. */
INLINE void sum_rows(task of)
{
    #pragma omp for schedule(static) nowait
    for (long row = 0; row < of.left.rows; row++) {
        int32_t sum = 0;
        for (long term = 0; term < of.K; term++)
            sum += of.left.codes[row * of.left.by_row + term];
        of.left_sums[row] = sum;
    }
}

/* A thread's part of a product. */
INLINE void multiply(task of, int terms, int in_bits, int largest)
{
    const long N = of.left.rows, O = of.right.rows, W = (of.K + terms - 1) / terms;
    const long spill = terms == PAIRS ? LARGEST / largest : DEPTH;
    const int step = terms == PAIRS ? 1 : LEFT_PANEL;
    pack(of.right, RIGHT_PANEL, of.K, terms, in_bits, in_bits ? 0 : largest, of.right_packed);
    if (terms == WIDE)
        pack(of.left, LEFT_PANEL, of.K, terms, 0, 0, of.left_packed);
    else
        sum_rows(of);
    #pragma omp barrier
    #pragma omp for collapse(2) schedule(static)
    for (long begin = 0; begin < N; begin += BLOCK)
        for (long column = 0; column < O; column += RIGHT_PANEL) {
            const long rows = smaller(BLOCK, N - begin), width = smaller(RIGHT_PANEL, O - column);
            int32_t sums[BLOCK * RIGHT_PANEL] __attribute__((aligned(32))) = {0};
            for (long word = 0; word < W; word += DEPTH)
                for (long row = 0; row < rows; row += ROWS) {
                    const __m256i *const right = (const __m256i *)of.right_packed + column / 8 * W + 2 * word;
                    const int32_t *left[ROWS];
                    for (long i = 0; i < ROWS; i++) {
                        const long at = smaller(begin + row + i, N - 1); /* what is too much is not looked at */
                        left[i] = terms == PAIRS ? (const int32_t *)of.left.codes + at * W + word
                                                 : (const int32_t *)of.left_packed + at / LEFT_PANEL * LEFT_PANEL * W +
                                                       word * LEFT_PANEL + at % LEFT_PANEL;
                    }
                    add_tile(left, step, right, smaller(DEPTH, W - word), spill, terms,
                             (__m256i *)(sums + row * RIGHT_PANEL));
                }
            for (long row = 0; row < rows; row++) {
                int32_t *const found = sums + row * RIGHT_PANEL;
                float in_fp32[RIGHT_PANEL];
                if (terms == PAIRS)
                    for (int i = 0; i < RIGHT_PANEL; i++)
                        in_fp32[i] = (float)(found[i] - largest * of.left_sums[begin + row]);
                copy_row((int32_t *)of.result + (begin + row) * O + column, terms == PAIRS ? (void *)in_fp32 : found,
                         width);
            }
        }
}

INLINE uint8_t largest_of(const int8_t *codes, long count)
{
    uint8_t largest = 1;
    for (long i = 0; i < count; i++) {
        const uint8_t size = codes[i] < 0 ? -codes[i] : codes[i];
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* Left rows that lie one after another, in whole words, times right ones, dense and at most 64; returns the largest,
   and does nothing if it is larger. */
int product_in_pairs(const task *of, int threads)
{
    const long count = of->right.rows * of->K, piece = 1 << 14;
    uint8_t largest = 1;
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static) reduction(max : largest)
        for (long begin = 0; begin < count; begin += piece) {
            const uint8_t found = largest_of(of->right.codes + begin, smaller(piece, count - begin));
            largest = found > largest ? found : largest;
        }
        if (largest <= LARGEST)
            multiply(*of, PAIRS, 0, largest);
    }
    return largest;
}

/* Left rows times right ones, both packed fastest if rows lie side by side. */
void product_in_words(const task *of, int threads)
{
    #pragma omp parallel num_threads(threads)
    multiply(*of, WIDE, 0, 0);
}

/* Add up the products of a left row and of the four rows in packed bytes, whose codes have 1 added. */
INLINE void add_dots(const int8_t *left, const int8_t *packed, long K, int32_t sums[4])
{
    const long step = sizeof(__m256i), whole = K / step * step;
    __m256i total[4];
    for (int quarter = 0; quarter < 4; quarter++)
        total[quarter] = _mm256_setzero_si256();
    for (long begin = 0; begin < whole; begin += 64 * step) {
        __m256i found[4];
        for (int quarter = 0; quarter < 4; quarter++)
            found[quarter] = _mm256_setzero_si256();
        for (long term = begin; term < smaller(whole, begin + 64 * step); term += step) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)(left + term));
            const __m256i bytes = _mm256_loadu_si256((const __m256i *)(packed + term));
            for (int quarter = 0; quarter < 4; quarter++)
                found[quarter] = _mm256_add_epi16(found[quarter], _mm256_maddubs_epi16(codes_of(bytes, quarter), x));
        }
        for (int quarter = 0; quarter < 4; quarter++)
            total[quarter] = _mm256_add_epi32(total[quarter], _mm256_madd_epi16(found[quarter], _mm256_set1_epi16(1)));
    }
    for (int quarter = 0; quarter < 4; quarter++) {
        int32_t each[8];
        memcpy(each, &total[quarter], sizeof each);
        for (int i = 0; i < 8; i++)
            sums[quarter] += each[i];
        for (long term = whole; term < K; term++)
            sums[quarter] += left[term] * (((uint8_t)packed[term] ^ 128) >> 2 * quarter & 3);
    }
}

/* The products of `product_in_bits` from the bytes as they are read: a thread's part. */
INLINE void multiply_few(task of)
{
    const long N = of.left.rows, O = of.right.rows, in_quarter = O / 4;
    sum_rows(of);
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (long column = 0; column < in_quarter; column++)
        for (long row = 0; row < N; row++) {
            int32_t sums[4] = {0};
            add_dots(of.left.codes + row * of.left.by_row, of.right.codes + column * of.K, of.K, sums);
            for (int quarter = 0; quarter < 4; quarter++)
                ((float *)of.result)[row * O + quarter * in_quarter + column] =
                    (float)(sums[quarter] - of.left_sums[row]);
        }
}

/* `product_in_pairs` of right rows in bytes of four, of [O / 4, K]; few left rows without packing. */
int product_in_bits(const task *of, int threads)
{
    #pragma omp parallel num_threads(threads)
    if (of->right_packed)
        multiply(*of, PAIRS, 1, 1);
    else
        multiply_few(*of);
    return 1;
}

/* `x * scale`, [N, O] and [N], whose columns are rounded to codes of -127 to 127. */
typedef struct {
    const float *x, *scale;
    long N, O;
    float smallest; /* floor of a column's largest magnitude */
    int8_t *codes;  /* [N, O] */
    float *scales;  /* [O], of columns */
} columns;

INLINE int32_t bits_of(float x)
{
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(int32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Magnitudes are compared by their bits, whose order is the same; what is no number comes last. Added to 1.5 * 2**23,
   a number is rounded to the nearest integer, ties to even, which is in the lowest bits then. */
INLINE void round_columns(columns of, long first, long count)
{
    int32_t largest[COLUMNS];
    float factors[COLUMNS];
    for (long i = 0; i < count; i++)
        largest[i] = bits_of(of.smallest);
    for (long row = 0; row < of.N; row++)
        for (long i = 0; i < count; i++) {
            const int32_t size = bits_of(of.x[row * of.O + first + i] * of.scale[row]) & INT32_MAX;
            largest[i] = size > largest[i] ? size : largest[i];
        }
    for (long i = 0; i < count; i++) {
        factors[i] = 1 / float_of(largest[i]) * 127;
        of.scales[first + i] = float_of(largest[i]) / 127;
    }
    for (long row = 0; row < of.N; row++)
        for (long i = 0; i < count; i++) {
            const float x = of.x[row * of.O + first + i] * of.scale[row] * factors[i];
            of.codes[row * of.O + first + i] = bits_of(x + 0x1.8p23f);
        }
}

void quantize_columns(const float *x, const float *scale, long N, long O, float smallest, int8_t *codes, float *scales,
                      int threads)
{
    const columns of = {x, scale, N, O, smallest, codes, scales};
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long first = 0; first < O; first += COLUMNS)
        if (first + COLUMNS <= O)
            round_columns(of, first, COLUMNS);
        else
            round_columns(of, first, O - first);
}

/* Codes of `quant.codes.pack_rows`: [O, J] bytes to [O, width]. */
void unpack_rows(const uint8_t *packed, int8_t *codes, long O, long J, long width, int threads)
{
    #pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < O; row++)
        for (long first = 0, shift = 0; first < width; first += J, shift += 2) {
            const long count = smaller(J, width - first);
            const uint8_t *const from = packed + row * J;
            int8_t *const to = codes + row * width + first;
            long i = 0;
            for (; i + (long)sizeof(__m256i) <= count; i += sizeof(__m256i)) {
                const __m256i bytes = _mm256_loadu_si256((const __m256i *)(from + i));
                const __m256i bits = _mm256_and_si256(_mm256_srli_epi32(bytes, shift), LOWEST);
                _mm256_storeu_si256((__m256i *)(to + i), _mm256_sub_epi8(bits, _mm256_set1_epi8(1)));
            }
            for (; i < count; i++)
                to[i] = (from[i] >> shift & 3) - 1;
        }
}
