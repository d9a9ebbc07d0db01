// Kernels of coarse-to-fine refinement: cut, resample, blend and compare the tiles of a batch.
//
// Compiled ahead of time to kernels.ptx by tools/compile_kernels.py, with contraction of a * b + c switched off
// (--fmad=false), so that every result is numpy's bit for bit. Images are float, rows of RGB pixels without padding.
// tests/gpu/test_kernels.py compiles this file with g++ and compares it with numpy. Not yet run on a GPU.

// A tile that was computed before this one and overlaps it.
struct Neighbor {
    int slot;         // of its image; -1: there is none
    int down, right;  // where this tile's first pixel lies in it
};

// What the kernels need to know of one tile. device_pyramid.TILE is the same record in numpy.
struct Tile {
    int top, left;                  // in the canvas of its level
    int row, column;                // of its blend windows
    int source_top, source_left;    // in the canvas of the level before, which has half the size
    int source_rows, source_columns;  // that this canvas has there; the rest is continued by reflection
    int slot;                       // where its image is kept, for this launch and for its neighbors
    Neighbor neighbors[2];          // on the left and above
};

__device__ int thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Continues 0..length-1 by reflection. The outermost pixel is not repeated, a single one is.
__device__ int reflect(int place, int length)
{
    int period = 2 * length - 2 > 1 ? 2 * length - 2 : 1;
    place %= period;
    return place < period - place ? place : period - place;
}

// out[n, y, x] = canvas[source of tile n, continued by reflection]; out: (tiles, size, size, 3).
// Grid: x over size * size * 3, y over tiles.
extern "C" __global__ void cut(float *out, const float *canvas, const Tile *tiles, int width, int size)
{
    int index = thread_index(), count = size * size * 3;
    if (index >= count) return;
    Tile tile = tiles[blockIdx.y];
    int channel = index % 3, x = index / 3 % size, y = index / 3 / size;
    int row = tile.source_top + reflect(y, tile.source_rows);
    int column = tile.source_left + reflect(x, tile.source_columns);
    out[(size_t)blockIdx.y * count + index] = canvas[((size_t)row * width + column) * 3 + channel];
}

// One axis of a resampling: out[a, m, c] = sum over k of weights[m, k] * source[a * row + min(first[m] + k, last) *
// inner + c], added up in double. m runs over length, c over inner, a over the rest of count. clip: to 0..255.
extern "C" __global__ void resample(float *out, const float *source, const int *first, const double *weights, int taps,
                                    int last, int row, int inner, int length, int clip, int count)
{
    int index = thread_index();
    if (index >= count) return;
    int c = index % inner, m = index / inner % length, a = index / inner / length;
    double sum = 0;
    for (int k = 0; k < taps; k++) {
        int place = first[m] + k < last ? first[m] + k : last;
        sum += weights[m * taps + k] * source[(size_t)a * row + place * inner + c];
    }
    float value = (float)sum;
    if (clip) value = value < 0 ? 0 : value > 255 ? 255 : value;
    out[index] = value;
}

// For each pixel of a box of the canvas and each tile that shows it, in the order of the tiles:
// canvas = mask ? canvas + row_window * column_window * tile : image.
// kept: (slots, size, size, 3), the tiles' images. images, masks: (tiles, size, size[, 3]), the model's inputs.
// row_windows, column_windows: (rows, size), (columns, size). The box starts at (top, left), `columns` wide.
extern "C" __global__ void blend(float *canvas, const float *kept, const unsigned char *images,
                                 const unsigned char *masks, const float *row_windows, const float *column_windows,
                                 const Tile *tiles, int batch, int width, int top, int left, int columns, int size,
                                 int count)
{
    int index = thread_index();
    if (index >= count) return;
    int y = top + index / columns, x = left + index % columns;
    float *pixel = canvas + ((size_t)y * width + x) * 3;
    for (int n = 0; n < batch; n++) {
        Tile tile = tiles[n];
        int down = y - tile.top, right = x - tile.left;
        if (down < 0 || down >= size || right < 0 || right >= size) continue;
        size_t place = ((size_t)n * size + down) * size + right;
        const float *shown = kept + (((size_t)tile.slot * size + down) * size + right) * 3;
        float weight = row_windows[tile.row * size + down] * column_windows[tile.column * size + right];
        for (int channel = 0; channel < 3; channel++)
            pixel[channel] = masks[place] ? pixel[channel] + weight * shown[channel] : images[place * 3 + channel];
    }
}

// Adds to plane, for each masked pixel of a box and each tile that shows it, the mean absolute difference over the
// channels to the tile's neighbors. The box is given as for blend.
extern "C" __global__ void compare(float *plane, const float *kept, const unsigned char *masks, const Tile *tiles,
                                   int batch, int width, int top, int left, int columns, int size, int count)
{
    int index = thread_index();
    if (index >= count) return;
    int y = top + index / columns, x = left + index % columns;
    for (int n = 0; n < batch; n++) {
        Tile tile = tiles[n];
        int down = y - tile.top, right = x - tile.left;
        if (down < 0 || down >= size || right < 0 || right >= size) continue;
        if (!masks[((size_t)n * size + down) * size + right]) continue;
        const float *mine = kept + (((size_t)tile.slot * size + down) * size + right) * 3;
        for (int k = 0; k < 2; k++) {
            Neighbor other = tile.neighbors[k];
            if (other.slot < 0 || down + other.down >= size || right + other.right >= size) continue;
            size_t place = ((size_t)other.slot * size + down + other.down) * size + right + other.right;
            const float *theirs = kept + place * 3;
            float sum = fabsf(mine[0] - theirs[0]);
            sum += fabsf(mine[1] - theirs[1]);
            sum += fabsf(mine[2] - theirs[2]);
            plane[(size_t)y * width + x] += sum / 3;
        }
    }
}
