//! What each request does, and what the configuration says.

use super::*;

#[test]
fn the_configuration_describes_the_disk() {
    let guest = Guest::new(|config| {
        config.queues = 3;
        config.queue_size = 128;
    });

    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, capacity)), SECTORS as u32);
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, capacity) + 4), 0);
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, seg_max)), 126);
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, blk_size)), 512);
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, wce)), 1 | 3 << 16);
    assert_eq!(guest.config_u32(offset_of!(virtio_blk_config, max_discard_seg)), 1);
    assert_eq!(guest.config_u32(CONFIG_BYTES), 0, "nothing after the end");
    assert_eq!(guest.queues.len(), 3);
}

#[test]
fn features_follow_the_configuration() {
    let offered = |change: fn(&mut DiskConfig)| {
        let bits = Guest::new(change).driver.offered();
        move |bit: u32| bits >> bit & 1 != 0
    };
    let plain = offered(|_| {});
    for bit in [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ] {
        assert!(plain(bit), "bit {bit}");
    }
    assert!(!plain(VIRTIO_BLK_F_RO) && !plain(VIRTIO_BLK_F_MQ));
    let read_only = offered(|config| config.readonly = true);
    assert!(read_only(VIRTIO_BLK_F_RO) && !read_only(VIRTIO_BLK_F_DISCARD));
    assert!(!offered(|config| config.discard = false)(VIRTIO_BLK_F_WRITE_ZEROES));
    assert!(!offered(|config| config.sync = false)(VIRTIO_BLK_F_FLUSH));
    assert!(offered(|config| config.queues = 2)(VIRTIO_BLK_F_MQ));
}

#[test]
fn data_goes_to_the_image_and_back() {
    for engine in ENGINES {
        let mut guest = Guest::new(|config| config.engine = Some(engine));
        let data: Vec<u8> = (0..8192u32).map(|at| (at % 251) as u8).collect();

        assert_eq!(guest.write(100, &data), OK);
        let (status, read, written) = guest.request(&header(VIRTIO_BLK_T_IN, 99), 8192 + 1024);
        assert_eq!((status, written), (OK, 8192 + 1024 + 1));
        assert_eq!(read, [vec![99; 512], data.clone(), vec![116; 512]].concat());
        assert_eq!(guest.request(&header(VIRTIO_BLK_T_FLUSH, 0), 0).0, OK);
        let bytes = fs::read(guest.file.path()).unwrap();
        assert_eq!(bytes[100 * 512..116 * 512], data);

        let metrics = &guest.metrics;
        assert_eq!((metrics.reads.get(), metrics.read_bytes.get()), (1, 9216));
        assert_eq!((metrics.writes.get(), metrics.write_bytes.get()), (1, 8192));
        assert_eq!((metrics.flushes.get(), metrics.host_errors.get()), (1, 0));
    }
}

#[test]
fn the_id_is_told_as_far_as_there_is_room() {
    let mut guest = Guest::new(|config| config.id = Some("scratch-1".into()));
    let expected = [&b"scratch-1"[..], &[0; 11]].concat();
    let get_id = header(VIRTIO_BLK_T_GET_ID, 0);

    assert_eq!(guest.request(&get_id, 20), (OK, expected.clone(), 21));
    assert_eq!(guest.request(&get_id, 5), (OK, expected[..5].to_vec(), 6));
    let (status, data, written) = guest.request(&get_id, 30);
    assert_eq!((status, &data[..20], written), (OK, expected.as_slice(), 20));
    assert_eq!(guest.request(&get_id, 0), (OK, Vec::new(), 1));
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    for engine in ENGINES {
        let mut guest = Guest::new(|config| config.engine = Some(engine));
        let zeroes = header(VIRTIO_BLK_T_WRITE_ZEROES, 0);
        let discard = header(VIRTIO_BLK_T_DISCARD, 0);
        let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

        assert_eq!(guest.request(&[zeroes.clone(), range(10, 3, 0)].concat(), 0).0, OK);
        assert_eq!(guest.request(&[zeroes.clone(), range(20, 8, unmap)].concat(), 0).0, OK);
        assert_eq!(guest.request(&[discard.clone(), range(64, 64, 0)].concat(), 0).0, OK);
        assert_eq!(guest.request(&[discard.clone(), range(64, 0, 0)].concat(), 0).0, OK);

        let (_, data) = guest.read(9, 20 * 512);
        let sum = |sector: usize| data[sector * 512..(sector + 1) * 512].iter().any(|b| *b != 0);
        let kept: Vec<usize> = (0..20).filter(|sector| sum(*sector)).map(|at| at + 9).collect();
        assert_eq!(kept, [9, 13, 14, 15, 16, 17, 18, 19, 28]);
        let status =
            |guest: &mut Guest, request: [Vec<u8>; 2]| guest.request(&request.concat(), 0).0;
        let far = range(SECTORS - 1, 2, 0);
        assert_eq!(status(&mut guest, [zeroes.clone(), far.clone()]), IOERR);
        assert_eq!(status(&mut guest, [discard.clone(), far]), IOERR);
        assert_eq!(status(&mut guest, [zeroes.clone(), range(u64::MAX, 1, 0)]), IOERR);
        assert_eq!(status(&mut guest, [zeroes.clone(), range(0, u32::MAX, 0)]), IOERR);
        assert_eq!(status(&mut guest, [zeroes.clone(), range(0, 1, 2)]), UNSUPP);
        assert_eq!(status(&mut guest, [discard.clone(), range(0, 1, unmap)]), UNSUPP);
        assert_eq!(status(&mut guest, [discard.clone(), vec![0; 15]]), IOERR);
        assert_eq!(status(&mut guest, [discard.clone(), vec![0; 32]]), IOERR);
        assert_eq!(guest.request(&discard, 0).0, IOERR);
        assert_eq!((guest.metrics.discards.get(), guest.metrics.write_zeroes.get()), (2, 2));
    }
}

#[test]
fn what_makes_no_sense_gets_an_error_and_hurts_nothing() {
    let mut guest = Guest::new(|_| {});
    let before = fs::read(guest.file.path()).unwrap();

    assert_eq!(guest.read(SECTORS, 512).0, IOERR);
    assert_eq!(guest.read(SECTORS - 1, 1024).0, IOERR);
    assert_eq!(guest.read(u64::MAX, 512).0, IOERR);
    assert_eq!(guest.read(u64::MAX / 512, 512).0, IOERR);
    assert_eq!(guest.read(0, 511).0, IOERR);
    assert_eq!(guest.write(SECTORS, &[1; 512]), IOERR);
    assert_eq!(guest.write(0, &[1; 513]), IOERR);
    let write = [header(VIRTIO_BLK_T_OUT, 0), vec![1; 512]].concat();
    assert_eq!(guest.request(&write, 512).0, IOERR, "a write with room to write");
    assert_eq!(guest.request(&header(VIRTIO_BLK_T_IN, 0)[..15], 512).0, IOERR);
    assert_eq!(guest.request(&header(77, 0), 512).0, UNSUPP);
    assert_eq!(guest.request(&header(u32::MAX, 0), 0).0, UNSUPP);
    assert_eq!(guest.read(0, 0), (OK, Vec::new()));

    assert_eq!(fs::read(guest.file.path()).unwrap(), before);
    assert_eq!(guest.metrics.refused.get(), 11);
    assert_eq!(guest.metrics.host_errors.get(), 0);
}

#[test]
fn a_request_without_a_status_byte_is_given_back_untouched() {
    let mut guest = Guest::new(|_| {});
    let mut queue = guest.queues[0];
    let input = guest.driver.allocate(528);
    guest.driver.describe(&queue, 3, Desc { addr: input, len: 528, flags: 0, next: 0 });
    guest.driver.offer(&mut queue, 3);
    guest.queues[0] = queue;
    guest.kick(0);

    assert_eq!(guest.wait(0, 1), [(3, 0)]);
    assert_eq!(guest.read(1, 512), (OK, vec![1; 512]));
}

#[test]
fn what_was_not_offered_is_not_supported() {
    let mut guest = Guest::new(|config| {
        config.discard = false;
        config.sync = false;
    });
    let request = [header(VIRTIO_BLK_T_DISCARD, 0), range(0, 1, 0)].concat();

    assert_eq!(guest.request(&request, 0).0, UNSUPP);
    assert_eq!(guest.request(&header(VIRTIO_BLK_T_FLUSH, 0), 0).0, UNSUPP);
    let mut guest = Guest::new(|config| config.readonly = true);
    assert_eq!(guest.write(0, &[9; 512]), IOERR);
    assert_eq!(guest.read(3, 512), (OK, vec![3; 512]));
}

#[test]
fn a_file_cut_off_becomes_an_io_error_that_is_counted() {
    for engine in ENGINES {
        let mut guest = Guest::new(|config| config.engine = Some(engine));
        guest.file.as_file().set_len(512).unwrap();

        assert_eq!(guest.read(1, 512).0, IOERR);
        assert_eq!(guest.read(8, 4096).0, IOERR);
        assert_eq!(guest.read(0, 512), (OK, vec![0; 512]));
        assert_eq!(guest.metrics.host_errors.get(), 2);
    }
}

#[test]
fn the_caches_mode_is_the_drivers_choice() {
    let wce = offset_of!(virtio_blk_config, wce);
    let mut guest = Guest::new(|_| {});
    assert_eq!(guest.config_u32(wce) as u8, 1);
    guest.write_config_u8(wce, 0);
    assert_eq!(guest.config_u32(wce) as u8, 0);
    assert_eq!(guest.write(1, &[8; 512]), OK);
    for (offset, value) in [(wce, 2), (wce, 0xff), (wce + 1, 1), (0, 1)] {
        guest.write_config_u8(offset, value);
    }
    assert_eq!(guest.config_u32(wce) as u8, 0);
    assert_eq!(guest.config_u32(0), SECTORS as u32);
    guest.write_config_u8(wce, 1);
    assert_eq!(guest.config_u32(wce) as u8, 1);

    // Without the feature, the switch does nothing; without flushes, writes last by themselves.
    let without = Guest::with_features(!(1 << VIRTIO_BLK_F_CONFIG_WCE), |_| {});
    without.write_config_u8(wce, 0);
    assert_eq!(without.config_u32(wce) as u8, 1);
    let mut through = Guest::with_features(!(1 << VIRTIO_BLK_F_FLUSH), |_| {});
    assert_eq!(through.config_u32(wce) as u8, 0);
    assert_eq!(through.write(1, &[8; 512]), OK);
    through.driver.reset();
    assert_eq!(through.config_u32(wce) as u8, 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any header, any lengths: an answer, and nothing outside the image changes.
    #[test]
    fn any_request_is_answered(
        request_type in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..SECTORS + 10, any::<u64>()],
        body in prop::collection::vec(any::<u8>(), 0..1200),
        writable in 0u32..2000,
        uring: bool,
    ) {
        let engine = if uring { Engine::IoUring } else { Engine::Sync };
        let mut guest = Guest::new(|config| config.engine = Some(engine));
        let readable = [header(request_type, sector), body].concat();

        let (status, _, written) = guest.request(&readable, writable);

        prop_assert!([OK, IOERR, UNSUPP].contains(&status));
        prop_assert!(written <= writable + 1);
        prop_assert_eq!(fs::metadata(guest.file.path()).unwrap().len(), SECTORS * 512);
        prop_assert_eq!(guest.read(SECTORS - 1, 512).0, OK);
    }
}
