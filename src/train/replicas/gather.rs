//! The bytes of all replicas, by nothing but sums.

use super::Replicas;

/// The bytes of each replica, in their order.
pub fn gather<R: Replicas + ?Sized>(replicas: &R, bytes: &[u8]) -> Vec<Vec<u8>> {
    let lengths = gather_equal(replicas, &bytes.len().to_le_bytes());
    let lengths =
        lengths.into_iter().map(|it| usize::from_le_bytes(it.try_into().expect("8 bytes")));
    let lengths: Vec<_> = lengths.collect();
    let mut padded = bytes.to_vec();
    padded.resize(lengths.iter().copied().max().unwrap_or_default(), 0);
    let mut all = gather_equal(replicas, &padded);
    all.iter_mut().zip(lengths).for_each(|(bytes, length)| bytes.truncate(length));
    all
}

/// The same where all have as many bytes: each writes its own between zeros.
fn gather_equal<R: Replicas + ?Sized>(replicas: &R, bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut buffer = vec![0.0; replicas.count() * bytes.len()];
    let own = &mut buffer[replicas.index() * bytes.len()..][..bytes.len()];
    own.iter_mut().zip(bytes).for_each(|(number, byte)| *number = f32::from(*byte));
    replicas.sum(&mut buffer);
    let bytes: Vec<u8> = buffer.iter().map(|number| *number as u8).collect();
    let length = bytes.len() / replicas.count();
    (0..replicas.count()).map(|it| bytes[it * length..][..length].to_vec()).collect()
}
