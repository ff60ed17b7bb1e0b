/* RMSNorm from a C program: y = x / sqrt(mean(x^2) + eps) * weight, checked against a plain loop.
 *
 *   cc -std=c99 -Wall rms_norm.c -o rms_norm $(python -m leantune_kernels --cflags --libs) -lm && ./rms_norm
 *
 * The library needs no Python when the program runs; LEANTUNE_ISA=base (avx2, avx512) chooses its instruction level.
 */
#include <leantune_kernels.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 100, COLS = 577 };
static float x[ROWS * COLS], weight[COLS], y[ROWS * COLS], rstd[ROWS];

/* The largest difference between y and the formula in double precision. */
static double largest_error(double eps) {
    double largest = 0;
    for (int t = 0; t < ROWS; ++t) {
        double squares = 0;
        for (int h = 0; h < COLS; ++h)
            squares += (double)x[t * COLS + h] * x[t * COLS + h];
        for (int h = 0; h < COLS; ++h) {
            const double expected = x[t * COLS + h] / sqrt(squares / COLS + eps) * weight[h];
            largest = fmax(largest, fabs(expected - y[t * COLS + h]));
        }
    }
    return largest;
}

int main(void) {
    const float eps = 1e-5f;
    for (int i = 0; i < ROWS * COLS; ++i)
        x[i] = (float)rand() / RAND_MAX - 0.5f;
    for (int h = 0; h < COLS; ++h)
        weight[h] = 1 + (float)h / COLS;

    if (lt_rms_norm_forward(LT_F32, x, COLS, LT_F32, weight, y, COLS, rstd, ROWS, COLS, eps) != LT_OK) {
        fprintf(stderr, "%s\n", lt_last_error());
        return EXIT_FAILURE;
    }
    const double error = largest_error(eps);
    printf("%d rows of %d on %d threads, level %s: largest error %.2g\n", ROWS, COLS, lt_num_threads(), lt_isa(),
           error);
    return error < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
