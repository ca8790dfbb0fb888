use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

/// Reads as its number and keeps the last write's offset.
struct Probe {
    number: u8,
    last_write: Mutex<Option<(u64, Vec<u8>)>>,
}

impl Probe {
    fn new(number: u8) -> Arc<Self> {
        Arc::new(Self { number, last_write: Mutex::new(None) })
    }

    fn take_write(&self) -> Option<(u64, Vec<u8>)> {
        self.last_write.lock().unwrap().take()
    }
}

impl BusDevice for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(self.number.wrapping_add(offset as u8));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        *self.last_write.lock().unwrap() = Some((offset, data.to_vec()));
    }
}

fn read(bus: &Bus, address: u64, width: usize) -> (bool, Vec<u8>) {
    let mut data = vec![0; width];
    (bus.read(address, &mut data), data)
}

#[test]
fn accesses_reach_the_device_with_the_offset_into_its_range() {
    let mut bus = Bus::new();
    let probe = Probe::new(0x10);
    bus.insert(0x3f8, 8, probe.clone()).unwrap();

    assert_eq!(read(&bus, 0x3f8, 1), (true, vec![0x10]));
    assert_eq!(read(&bus, 0x3ff, 1), (true, vec![0x17]));
    assert!(bus.write(0x3fa, &[1, 2]));
    assert_eq!(probe.take_write(), Some((2, vec![1, 2])));
}

#[test]
fn the_addresses_next_to_a_range_are_nobodys() {
    let mut bus = Bus::new();
    bus.insert(0x3f8, 8, Probe::new(0)).unwrap();
    for address in [0, 0x3f7, 0x400, u64::MAX] {
        assert_eq!(read(&bus, address, 1), (false, vec![0xff]), "{address:#x}");
        assert!(!bus.write(address, &[0]));
    }
}

#[test]
fn an_access_that_straddles_an_edge_reaches_no_device() {
    let mut bus = Bus::new();
    let (low, high) = (Probe::new(1), Probe::new(2));
    bus.insert(0x100, 4, low.clone()).unwrap();
    bus.insert(0x104, 4, high.clone()).unwrap();
    for address in [0xff, 0x103, 0x107] {
        assert_eq!(read(&bus, address, 2), (false, vec![0xff; 2]), "{address:#x}");
        assert!(!bus.write(address, &[0, 0]));
    }
    assert_eq!((low.take_write(), high.take_write()), (None, None));
}

#[test]
fn accesses_at_the_end_of_the_address_space_do_not_wrap() {
    let mut bus = Bus::new();
    bus.insert(0, 4, Probe::new(1)).unwrap();
    bus.insert(u64::MAX - 8, 8, Probe::new(2)).unwrap();
    assert_eq!(read(&bus, u64::MAX - 8, 8), (true, vec![2; 8]));
    assert_eq!(read(&bus, u64::MAX - 1, 4), (false, vec![0xff; 4]));
    assert_eq!(read(&bus, u64::MAX, 8), (false, vec![0xff; 8]));
}

#[test]
fn empty_and_wrapping_ranges_are_refused() {
    let mut bus = Bus::new();
    let refused = |base, len| Err(BusError::BadRange { base, len });
    assert_eq!(bus.insert(0x60, 0, Probe::new(0)), refused(0x60, 0));
    assert_eq!(bus.insert(u64::MAX, 1, Probe::new(0)), refused(u64::MAX, 1));
    assert_eq!(bus.insert(1, u64::MAX, Probe::new(0)), refused(1, u64::MAX));
}

#[test]
fn overlapping_ranges_are_refused_and_touching_ones_are_not() {
    let mut bus = Bus::new();
    bus.insert(0x10, 0x10, Probe::new(0)).unwrap();
    for (base, len) in [(0x10, 0x10), (0, 0x11), (0x1f, 1), (0x14, 2), (0, 0x100)] {
        let result = bus.insert(base, len, Probe::new(1));
        assert_eq!(result, Err(BusError::Overlap { base, len }));
    }
    bus.insert(0, 0x10, Probe::new(1)).unwrap();
    bus.insert(0x20, 1, Probe::new(2)).unwrap();
}

#[test]
fn ranges_may_be_added_in_any_order() {
    let mut bus = Bus::new();
    for base in [0x30, 0x10, 0x40, 0x20] {
        bus.insert(base, 0x10, Probe::new(base as u8)).unwrap();
    }
    for base in [0x10, 0x20, 0x30, 0x40] {
        assert_eq!(read(&bus, base, 1), (true, vec![base as u8]));
    }
}

proptest! {
    #[test]
    fn look_ups_agree_with_a_list_searched_from_end_to_end(
        ranges in prop::collection::vec((0u64..200, 0u64..20), 0..30),
        accesses in prop::collection::vec((0u64..230, 0usize..9), 0..100),
    ) {
        let mut bus = Bus::new();
        let mut model: Vec<(u64, u64, u8)> = Vec::new();
        for (number, (base, len)) in ranges.into_iter().enumerate() {
            let number = number as u8;
            let free = len > 0 && model.iter().all(|(b, l, _)| base + len <= *b || b + l <= base);
            prop_assert_eq!(bus.insert(base, len, Probe::new(number)).is_ok(), free);
            if free {
                model.push((base, len, number));
            }
        }
        for (address, width) in accesses {
            let hit = model.iter().find(|(base, len, _)| {
                *base <= address && address < base + len + u64::from(width == 0)
                    && address + width as u64 <= base + len
            });
            let (answered, data) = read(&bus, address, width);
            // An access of no bytes means nothing; only that it does not panic counts.
            if width > 0 {
                prop_assert_eq!(answered, hit.is_some());
                let expected = hit.map_or(0xff, |(base, _, number)| {
                    number.wrapping_add((address - base) as u8)
                });
                prop_assert_eq!(data, vec![expected; width]);
            }
        }
    }
}
