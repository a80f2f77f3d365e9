//! The patches of images that a convolution multiplies with its kernel, as the columns of a matrix.

use std::ops::Range;

use super::simd::widest;

/// The shapes of a convolution without groups, and where its kernel reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    /// The channels of the input.
    pub channels: usize,
    /// The height and width of the input, as of all pairs below.
    pub image: [usize; 2],
    pub kernel: [usize; 2],
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    /// The padding at the top and on the left. What is on the other sides only determines the output's size.
    pub padding: [usize; 2],
    pub output: [usize; 2],
}

/// The most elements of patches that are gathered at once, so that they stay in a core's cache.
const PATCHES: usize = 1 << 18;

/// How a batch is divided.
#[derive(Clone, Copy)]
pub(super) struct Division {
    /// The number of images whose patches are multiplied at once.
    pub images: usize,
    /// The number of rows of the output that are computed at once, for these images.
    pub rows: usize,
}

/// A row of the output, as one element of the kernel reads it: consecutive places, `stride` pixels apart.
struct Run {
    /// The places before it that read padding.
    before: usize,
    /// The places that read pixels.
    inside: usize,
    /// The places after it that read padding.
    after: usize,
    /// The index of the first pixel.
    pixel: usize,
}

impl Window {
    /// The number of elements that the kernel reads at each place.
    pub fn patch(&self) -> usize {
        self.channels * self.kernel[0] * self.kernel[1]
    }

    /// The number of places in an output image.
    pub fn places(&self) -> usize {
        self.output[0] * self.output[1]
    }

    /// The number of elements of an input image.
    pub fn volume(&self) -> usize {
        self.channels * self.image[0] * self.image[1]
    }

    /// How a batch of images is divided. If there are fewer images than threads, the threads share them.
    pub fn division(&self, batch: usize) -> Division {
        let (threads, height) = (rayon::current_num_threads(), self.output[0]);
        let fair = height.div_ceil((threads / batch).max(1));
        match PATCHES / (self.patch() * self.places()) {
            0 => {
                let rows = PATCHES / (self.patch() * self.output[1]);
                Division { images: 1, rows: rows.clamp(1, fair) }
            }
            images => Division { images: images.min(batch.div_ceil(threads)), rows: fair },
        }
    }

    /// The rows of the output in the parts that are computed at once.
    pub fn parts(&self, division: Division) -> impl Iterator<Item = Range<usize>> + use<> {
        let height = self.output[0];
        (0..height).step_by(division.rows).map(move |row| row..height.min(row + division.rows))
    }

    /// Where output images store some rows: one range for each channel and image, by channel.
    pub fn lines(
        &self,
        images: usize,
        channels: usize,
        rows: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let (places, width) = (self.places(), self.output[1]);
        let (start, end) = (rows.start * width, rows.end * width);
        (0..channels).flat_map(move |channel| {
            let firsts = (0..images).map(move |image| (image * channels + channel) * places);
            firsts.map(move |first| first + start..first + end)
        })
    }

    /// Some rows of output images: `[channels, images · rows · width]`.
    pub fn take(
        &self,
        output: &[f32],
        images: usize,
        channels: usize,
        rows: &Range<usize>,
    ) -> Vec<f32> {
        let mut taken = Vec::with_capacity(channels * images * rows.len() * self.output[1]);
        let lines = self.lines(images, channels, rows);
        lines.for_each(|line| taken.extend_from_slice(&output[line]));
        taken
    }

    /// The patches under some rows of the output: `[patch, images · rows · width]`.
    pub fn gather(&self, images: &[f32], rows: Range<usize>) -> Vec<f32> {
        let count = images.len() / self.volume();
        let places = count * rows.len() * self.output[1];
        let mut patches = vec![0.0; self.patch() * places];
        let stride = self.stride[1];
        let mut rest = &mut patches[..];
        widest(
            #[inline(always)]
            || {
                self.each_run(count, rows, |Run { before, inside, after, pixel }| {
                    let (run, later) =
                        std::mem::take(&mut rest).split_at_mut(before + inside + after);
                    rest = later;
                    let run = &mut run[before..before + inside];
                    match stride {
                        1 => {
                            let pixels = &images[pixel..pixel + inside];
                            run.iter_mut().zip(pixels).for_each(|(value, pixel)| *value = *pixel);
                        }
                        _ => {
                            let pixels = images[pixel..].iter().step_by(stride);
                            run.iter_mut().zip(pixels).for_each(|(value, pixel)| *value = *pixel);
                        }
                    }
                });
            },
        );
        patches
    }

    /// Adds each element of the patches to the pixel that [`gather`](Self::gather) reads it from.
    pub fn scatter(&self, patches: &[f32], images: &mut [f32], rows: Range<usize>) {
        let count = images.len() / self.volume();
        let stride = self.stride[1];
        let mut rest = patches;
        widest(
            #[inline(always)]
            || {
                self.each_run(count, rows, |Run { before, inside, after, pixel }| {
                    let (run, later) = rest.split_at(before + inside + after);
                    rest = later;
                    let run = &run[before..before + inside];
                    match stride {
                        1 => {
                            let pixels = &mut images[pixel..pixel + inside];
                            pixels.iter_mut().zip(run).for_each(|(pixel, value)| *pixel += value);
                        }
                        _ => {
                            let pixels = images[pixel..].iter_mut().step_by(stride);
                            pixels.zip(run).for_each(|(pixel, value)| *pixel += value);
                        }
                    }
                });
            },
        );
    }

    /// Visits the runs in the order in which the patches store them.
    #[inline(always)]
    fn each_run(&self, images: usize, rows: Range<usize>, mut visit: impl FnMut(Run)) {
        let ([height, width], [_, places]) = (self.image, self.output);
        let ([top, left], [stride_y, stride_x]) = (self.padding, self.stride);
        for channel in 0..self.channels {
            for y in (0..self.kernel[0]).map(|it| it * self.dilation[0]) {
                for x in (0..self.kernel[1]).map(|it| it * self.dilation[1]) {
                    let end = (width + left).saturating_sub(x).div_ceil(stride_x).min(places);
                    let before = left.saturating_sub(x).div_ceil(stride_x).min(end);
                    let (inside, after) = (end - before, places - end);
                    for image in 0..images {
                        for row in rows.clone() {
                            let line = (row * stride_y + y).checked_sub(top);
                            let line = line.filter(|line| *line < height && inside > 0);
                            visit(match line {
                                None => Run { before: places, inside: 0, after: 0, pixel: 0 },
                                Some(line) => {
                                    let line = (image * self.channels + channel) * height + line;
                                    let pixel = line * width + before * stride_x + x - left;
                                    Run { before, inside, after, pixel }
                                }
                            });
                        }
                    }
                }
            }
        }
    }
}
