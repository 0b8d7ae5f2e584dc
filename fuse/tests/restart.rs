//! A worker that dies and the one that takes its connection over, through the kernel.
#![allow(clippy::unwrap_used)] // an error ends the test

mod common;

use std::fs;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use capsid_fuse::{Options, Owner, Server, mount};
use common::{image, open, run};

const NAME: &str = "a_request_that_a_dead_worker_had_read_is_answered_by_the_next_one";

#[test]
fn a_request_that_a_dead_worker_had_read_is_answered_by_the_next_one() {
    if let Some(image) = std::env::var_os("TEST_IMAGE") {
        return take_over(image.as_ref());
    }
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|word| word.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) < (Some(6), Some(9)) {
        eprintln!("SKIPPED: Linux {release} cannot send requests again, 6.9 can");
        return;
    }
    let (_dir, image) = image(&[]);
    run(Command::new("unshare")
        .args(["-Urm", "timeout", "60"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", NAME])
        .env("TEST_IMAGE", image));
}

fn take_over(image: &std::path::Path) {
    let options = mount::MountOptions {
        uid: 0,
        gid: 0,
        allow_other: false,
        source: "test".into(),
    };
    let mounted = mount::fuse(&options).unwrap();
    let point = tempfile::tempdir().unwrap();
    let flags = rustix::mount::MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&mounted.tree, "", rustix::fs::CWD, point.path(), flags).unwrap();

    // The first worker: answers INIT, reads one more request, and is never seen again.
    let mut request = vec![0; 16384];
    rustix::io::read(&mounted.device, request.as_mut_slice()).unwrap();
    let mut answer = 80_u32.to_le_bytes().to_vec();
    answer.extend([0; 4]);
    answer.extend(&request[8..16]);
    answer.extend([7, 0, 0, 0, 31, 0, 0, 0]);
    answer.resize(80, 0);
    rustix::io::write(&mounted.device, &answer).unwrap();
    let file = point.path().join("small");
    let reader = std::thread::spawn(move || fs::read(file));
    rustix::io::read(&mounted.device, request.as_mut_slice()).unwrap();

    // The next worker knows of nothing.
    let options = Options {
        owner: Owner::Image,
        stage: false,
        max_threads: 0,
        cache_bytes: 0,
    };
    let server = Arc::new(Server::squashfs(open(image), options));
    let again = mounted.device.try_clone().unwrap();
    Server::resume(again.as_fd());
    let serving = std::thread::spawn(move || server.serve(mounted.device));
    if !ends_soon(&reader) {
        // Without this, the reader could not even be killed.
        rustix::mount::unmount(point.path(), rustix::mount::UnmountFlags::FORCE).unwrap();
        panic!("the request is not answered");
    }
    assert_eq!(reader.join().unwrap().unwrap(), b"a small file\n");

    // And it ends when the last mount is gone.
    drop(mounted.tree);
    rustix::mount::unmount(point.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(ends_soon(&serving), "it goes on serving after the unmount");
    serving.join().unwrap().unwrap();
}

fn ends_soon<T>(thread: &std::thread::JoinHandle<T>) -> bool {
    for _ in 0..200 {
        if thread.is_finished() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}
