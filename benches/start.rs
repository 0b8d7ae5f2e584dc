//! Time from typing to `true` having run, beside the peers, alone and many at once: the figure that a script with many
//! short runs feels. Run as a normal user.
#![allow(missing_docs)]

mod sidebyside;

use criterion::{Criterion, criterion_group, criterion_main};

fn start(c: &mut Criterion) {
    sidebyside::measure(c, "start");
}

criterion_group!(benches, start);
criterion_main!(benches);
