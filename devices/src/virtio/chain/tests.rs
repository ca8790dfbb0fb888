use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::conformance::INDIRECT;
use crate::virtio::device::Memory;
use crate::virtio::ram::Ram;
use crate::virtio::testing::{Desc, HOLE, LOW_RAM_BYTES, NEXT, WRITE, memory};

const TABLE: u64 = 0x1000;
const BUFFERS: u64 = 0x2_0000;
const RULES: ChainRules =
    ChainRules { table: GuestAddress(TABLE), entries: 8, limit: 8, indirect: true };

fn write_table(memory: &Memory, table: u64, descs: &[Desc]) {
    for (index, desc) in (0u64..).zip(descs) {
        memory.write_slice(&desc.to_bytes(), GuestAddress(table + 16 * index)).unwrap();
    }
}

/// The chain of `descs` as they are, from the first on.
fn parse(rules: ChainRules, descs: &[Desc]) -> (Memory, Result<Chain, ChainError>) {
    let memory = memory();
    write_table(&memory, TABLE, descs);
    let mut chain = Chain::new();
    let result = rules.parse(&Ram::new(&memory), 0, &mut chain).map(|()| chain);
    (memory, result)
}

#[test]
fn each_flaw_is_named() {
    let write = Desc { addr: BUFFERS, len: 16, flags: WRITE, next: 0 };
    let read = Desc { flags: 0, ..write };
    let to = |next, desc: Desc| Desc { flags: desc.flags | NEXT, next, ..desc };
    let table = Desc { addr: BUFFERS, len: 32, flags: INDIRECT, next: 0 };
    let hole = ChainError::OutsideMemory { address: HOLE - 8, len: 16 };
    let hole_table = ChainError::OutsideMemory { address: HOLE - 8, len: 32 };
    let cases = [
        (vec![to(0, write)], ChainError::TooLong { limit: 8 }),
        (vec![to(8, write)], ChainError::NextOutsideTable { index: 8, entries: 8 }),
        (vec![Desc { addr: HOLE - 8, ..write }], hole),
        (vec![Desc { len: 0, ..write }], ChainError::ZeroLength),
        (vec![to(1, write), read], ChainError::ReadableAfterWritable),
        (vec![Desc { flags: INDIRECT | NEXT, ..table }], ChainError::IndirectWithNext),
        (vec![Desc { len: 0, ..table }], ChainError::IndirectLength { len: 0 }),
        (vec![Desc { len: 24, ..table }], ChainError::IndirectLength { len: 24 }),
        (vec![Desc { addr: HOLE - 8, ..table }], hole_table),
        // It refers to itself.
        (vec![Desc { addr: TABLE, ..table }], ChainError::NestedIndirect),
    ];
    for (descs, expected) in cases {
        let (_memory, result) = parse(RULES, &descs);
        assert_eq!(result.unwrap_err(), expected);
    }
    let (_memory, result) = parse(ChainRules { indirect: false, ..RULES }, &[table]);
    assert_eq!(result.unwrap_err(), ChainError::IndirectNotNegotiated);
}

#[test]
fn the_first_flaw_counts() {
    let hole = Desc { addr: HOLE, len: 1, flags: NEXT, next: 1 };
    let empty = Desc { addr: BUFFERS, len: 0, flags: 0, next: 0 };

    let (_memory, result) = parse(RULES, &[hole, empty]);

    assert_eq!(result.unwrap_err(), ChainError::OutsideMemory { address: HOLE, len: 1 });
}

#[test]
fn a_chain_may_be_as_long_as_the_limit_and_no_longer() {
    let desc = |index: u16| Desc { addr: BUFFERS, len: 1, flags: WRITE | NEXT, next: index + 1 };
    let mut descs: Vec<Desc> = (0..8).map(desc).collect();
    descs[7].flags = WRITE;
    let (_memory, result) = parse(RULES, &descs);
    assert_eq!(result.unwrap().writable_bytes(), 8);

    let (_memory, result) = parse(ChainRules { limit: 7, ..RULES }, &descs);
    assert_eq!(result.unwrap_err(), ChainError::TooLong { limit: 7 });
}

#[test]
fn a_chain_holds_4_gib_at_the_most() {
    let ranges = [(GuestAddress(0), 5 << 30)];
    let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let rest = |len| Desc { addr: 0, len, flags: WRITE, next: 0 };
    let first = Desc { addr: 0, len: u32::MAX, flags: WRITE | NEXT, next: 1 };
    let mut chain = Chain::new();

    write_table(&memory, TABLE, &[first, rest(1)]);
    assert_eq!(RULES.parse(&Ram::new(&memory), 0, &mut chain), Ok(()));
    assert_eq!(chain.writable_bytes(), 1 << 32);

    write_table(&memory, TABLE, &[first, rest(2)]);
    assert_eq!(RULES.parse(&Ram::new(&memory), 0, &mut chain), Err(ChainError::TooManyBytes));
}

#[test]
fn a_buffer_across_adjoining_ranges_is_two_pieces_at_the_most() {
    let desc = Desc { addr: LOW_RAM_BYTES - 4, len: 10, flags: WRITE, next: 0 };

    let (memory, result) = parse(RULES, &[desc]);

    let mut chain = result.unwrap();
    assert!(chain.writable().len() <= 2);
    assert_eq!(chain.write(b"0123456789"), 10);
    let mut data = [0; 10];
    memory.read_slice(&mut data, GuestAddress(LOW_RAM_BYTES - 4)).unwrap();
    assert_eq!(&data, b"0123456789");
}

#[test]
fn reading_more_than_there_is_reads_nothing() {
    let (_memory, result) = parse(RULES, &[Desc { addr: BUFFERS, len: 3, flags: 0, next: 0 }]);
    let mut chain = result.unwrap();

    assert_eq!(chain.read(&mut [0; 4]), Err(TooShort));

    assert_eq!(chain.readable_bytes(), 3);
    assert_eq!(chain.read(&mut [0; 3]), Ok(()));
    assert_eq!(chain.read(&mut []), Ok(()));
    assert!(chain.readable().is_empty());
}

#[test]
fn the_status_is_the_last_writable_byte() {
    let first = Desc { addr: BUFFERS, len: 2, flags: WRITE | NEXT, next: 1 };
    let second = Desc { addr: BUFFERS + 16, len: 1, flags: WRITE, next: 0 };
    let (memory, result) = parse(RULES, &[first, second]);
    let mut chain = result.unwrap();

    chain.write_status(7);
    chain.take_status().unwrap();
    assert_eq!(chain.writable_bytes(), 2);
    assert_eq!(chain.writable().len(), 1);
    assert_eq!(chain.write(&[1, 2, 3]), 2);
    chain.write_status(9);

    let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!([BUFFERS, BUFFERS + 1, BUFFERS + 16].map(byte), [1, 2, 9]);
    assert_eq!(chain.take_status(), Err(TooShort), "all was written");
}

proptest! {
    #[test]
    fn reads_and_writes_see_one_stream_whatever_the_cuts(
        pieces in prop::collection::vec(1..40u32, 1..8),
        reads in prop::collection::vec(0..50usize, 1..20),
    ) {
        let memory = memory();
        let total: u32 = pieces.iter().sum();
        let data: Vec<u8> = (0..total).map(|at| at as u8).collect();
        let mut descs = Vec::new();
        let mut at = 0;
        for (index, len) in pieces.iter().enumerate() {
            // Apart from one another.
            let addr = BUFFERS + 64 * index as u64;
            let end = at + *len as usize;
            memory.write_slice(&data[at..end], GuestAddress(addr)).unwrap();
            at = end;
            let flags = if index + 1 < pieces.len() { NEXT } else { 0 };
            descs.push(Desc { addr, len: *len, flags, next: index as u16 + 1 });
        }
        write_table(&memory, TABLE, &descs);
        let mut chain = Chain::new();
        RULES.parse(&Ram::new(&memory), 0, &mut chain).unwrap();

        let mut seen = Vec::new();
        for count in reads {
            let mut part = vec![0; count];
            if chain.read(&mut part).is_ok() {
                seen.extend(part);
            }
            let left: usize = chain.readable().iter().map(|piece| piece.iov_len).sum();
            prop_assert_eq!(chain.readable_bytes(), left as u64);
            prop_assert_eq!(left + seen.len(), data.len());
        }
        prop_assert_eq!(&seen[..], &data[..seen.len()]);
    }
}
