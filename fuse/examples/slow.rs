//! Slow storage for benches/compare: `slow IMAGE DIRECTORY MILLISECONDS` shows the image as `DIRECTORY/image`, each read of
//! which takes that much longer, until it is unmounted; then says how many there were. Needs the right to mount.

#[path = "../tests/common/slow_storage.rs"]
mod slow_storage;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [image, point, latency_ms] = &words[..] else {
        return Err("usage: slow IMAGE DIRECTORY MILLISECONDS".into());
    };
    let latency = Duration::from_millis(latency_ms.parse()?);
    let storage = slow_storage::serve(image.as_ref(), point.as_ref(), latency)?;
    let reads = storage.reads.clone();
    storage.join().map_err(|_| "a thread panicked")?;
    println!("{} reads", reads.load(Relaxed));
    Ok(())
}
