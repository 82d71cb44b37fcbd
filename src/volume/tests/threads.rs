//! Many threads on one volume.

use super::*;

#[test]
fn parts_of_the_same_chunks_are_written_by_all() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), &Options { compact_bytes: 512, ..Options::new("boot-1") }).unwrap();
    let size = 24 * CHUNK_BYTES;
    let base = made(&store, 1, size);
    base.write_at(&vec![0xee; usize::try_from(size).unwrap()], 0).unwrap();
    drop(base);
    store.take_snapshot(&volume_id(1), "s", 1, &snapshot_id(1)).unwrap();
    let volume = store.volume(&volume_id(1)).unwrap();
    const THREADS: usize = 8;
    let step = 512;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let volume = &volume;
            scope.spawn(move || {
                let mut numbers = Numbers(thread as u64);
                // Each has its own places in every block, and takes them in an order of its own.
                let places = size / (THREADS as u64 * step);
                let first = numbers.below(places);
                for number in 0..places {
                    let place = (first + number * 7919) % places;
                    let offset = place * THREADS as u64 * step + thread as u64 * step;
                    let byte = u8::try_from(thread + 1).unwrap();
                    volume.write_at(&vec![byte; 500], offset).unwrap();
                    if number % 61 == 0 {
                        volume.flush().unwrap();
                    }
                }
            });
        }
        let (store, volume) = (&store, &volume);
        scope.spawn(move || {
            for number in 0..6 {
                store.take_snapshot(&volume_id(1), &format!("t{number}"), 1, &snapshot_id(10 + number)).unwrap();
                let mut bytes = vec![0; 4096];
                volume.read_at(&mut bytes, 4096 * u64::from(number)).unwrap();
                assert!(bytes.iter().all(|byte| *byte == 0xee || *byte <= 8));
            }
        });
    });
    let check = |bytes: &[u8]| {
        let places = size / (THREADS as u64 * step);
        let visited: std::collections::BTreeSet<u64> = (0..places).map(|number| (number * 7919) % places).collect();
        assert_eq!(visited.len() as u64, places, "the order takes each place");
        for (place, piece) in bytes.chunks(usize::try_from(step).unwrap()).enumerate() {
            let byte = u8::try_from(place % THREADS + 1).unwrap();
            assert!(piece[..500].iter().all(|found| *found == byte), "{place}");
            assert!(piece[500..].iter().all(|found| *found == 0xee), "{place}");
        }
    };
    check(&content(&volume));
    drop(volume);
    drop(store);
    let store = open(dir.path());
    check(&content(&store.volume(&volume_id(1)).unwrap()));
    assert!(content_of(&store.snapshot(&snapshot_id(1)).unwrap()).iter().all(|byte| *byte == 0xee));
}

#[test]
fn what_one_chunk_is_last_written_with_is_there_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let volume = made(&store, 1, 4 * CHUNK_BYTES);
    std::thread::scope(|scope| {
        for thread in 1..7_u8 {
            let volume = &volume;
            scope.spawn(move || {
                for _ in 0..50 {
                    volume.write_at(&[thread; 4096], CHUNK_BYTES).unwrap();
                    volume.discard(2 * CHUNK_BYTES, CHUNK_BYTES).unwrap();
                    volume.write_at(&[thread; 4096], 2 * CHUNK_BYTES).unwrap();
                }
            });
        }
    });
    let bytes = content(&volume);
    let chunk = usize::try_from(CHUNK_BYTES).unwrap();
    assert!((1..7).contains(&bytes[chunk]));
    assert!(bytes[..chunk].iter().chain(&bytes[chunk + 4096..2 * chunk]).all(|byte| *byte == 0));
}
