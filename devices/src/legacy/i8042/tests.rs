use proptest::prelude::*;

use super::*;
use crate::testing::EventRecorder;

struct Fixture {
    data: Arc<dyn BusDevice>,
    command: Arc<dyn BusDevice>,
    events: Arc<EventRecorder>,
}

impl Fixture {
    fn new() -> Self {
        let events = Arc::new(EventRecorder::default());
        let (data, command) = I8042::ports(events.clone());
        Self { data, command, events }
    }

    fn drained() -> Self {
        let fixture = Self::new();
        while fixture.is_full() {
            fixture.read_data();
        }
        fixture
    }

    fn status(&self) -> u8 {
        let mut byte = [0];
        self.command.read(0, &mut byte);
        byte[0]
    }

    fn is_full(&self) -> bool {
        self.status() & status::OUTPUT_BUFFER_FULL != 0
    }

    fn read_data(&self) -> u8 {
        let mut byte = [0];
        self.data.read(0, &mut byte);
        byte[0]
    }

    fn command(&self, value: u8) {
        self.command.write(0, &[value]);
    }

    fn ask(&self, value: u8) -> u8 {
        self.command(value);
        assert!(self.is_full(), "command {value:#x} left no answer");
        let answer = self.read_data();
        assert!(!self.is_full(), "command {value:#x} left two answers");
        answer
    }
}

#[test]
fn linux_gives_up_the_probe_after_a_bounded_flush() {
    let fixture = Fixture::new();
    let mut reads = 0;
    while fixture.is_full() && reads < 17 {
        fixture.read_data();
        reads += 1;
    }
    assert_eq!(reads, 17, "the driver would have found a controller");
}

#[test]
fn an_unbounded_flush_ends() {
    let fixture = Fixture::new();
    let reads = (0..1000).take_while(|_| fixture.is_full() && fixture.read_data() == 0).count();
    assert_eq!(reads, usize::from(STALE_BYTES));
}

#[test]
fn the_input_buffer_is_never_full_so_that_a_reset_does_not_wait() {
    let fixture = Fixture::new();
    for value in 0..=u8::MAX {
        fixture.command(value);
        assert_eq!(fixture.status() & 0b10, 0);
    }
}

#[test]
fn commands_that_pulse_line_0_reset_and_no_others_do() {
    for value in 0..=u8::MAX {
        let fixture = Fixture::new();
        fixture.command(value);
        let resets = matches!(value, 0xf0..=0xff) && value % 2 == 0;
        let expected = if resets { vec![MachineEvent::Reset] } else { vec![] };
        assert_eq!(fixture.events.take(), expected, "command {value:#x}");
    }
}

#[test]
fn wide_reset_commands_reset_once() {
    for width in [1, 2, 4] {
        let fixture = Fixture::new();
        fixture.command.write(0, &[0xfe; 4][..width]);
        assert_eq!(fixture.events.take(), [MachineEvent::Reset]);
    }
}

#[test]
fn a_low_reset_line_in_the_output_port_resets() {
    let fixture = Fixture::drained();
    fixture.command(command::WRITE_OUTPUT_PORT);
    fixture.data.write(0, &[OUTPUT_PORT_NOT_RESET | OUTPUT_PORT_A20]);
    assert_eq!(fixture.events.take(), []);
    fixture.command(command::WRITE_OUTPUT_PORT);
    fixture.data.write(0, &[OUTPUT_PORT_A20]);
    assert_eq!(fixture.events.take(), [MachineEvent::Reset]);
}

#[test]
fn self_test_and_interface_tests_pass_and_discard_stale_bytes() {
    assert_eq!(Fixture::new().ask(command::SELF_TEST), 0x55);
    assert_eq!(Fixture::new().ask(command::TEST_KEYBOARD), 0);
    assert_eq!(Fixture::new().ask(command::TEST_AUX), 0);
}

#[test]
fn the_command_byte_reads_back() {
    let fixture = Fixture::drained();
    for value in 0..=u8::MAX {
        fixture.command(command::WRITE_COMMAND_BYTE);
        fixture.data.write(0, &[value]);
        assert_eq!(fixture.ask(command::READ_COMMAND_BYTE), value);
    }
}

#[test]
fn enabling_and_disabling_the_interfaces_shows_in_the_command_byte() {
    let fixture = Fixture::drained();
    let cases = [
        (command::ENABLE_KEYBOARD, command_byte::KEYBOARD_DISABLED, false),
        (command::DISABLE_KEYBOARD, command_byte::KEYBOARD_DISABLED, true),
        (command::ENABLE_AUX, command_byte::AUX_DISABLED, false),
        (command::DISABLE_AUX, command_byte::AUX_DISABLED, true),
    ];
    for (value, bit, set) in cases {
        fixture.command(value);
        assert_eq!(fixture.ask(command::READ_COMMAND_BYTE) & bit != 0, set, "{value:#x}");
    }
}

#[test]
fn bytes_for_an_absent_device_get_no_answer() {
    let fixture = Fixture::drained();
    for value in 0..=u8::MAX {
        fixture.data.write(0, &[value]);
        fixture.command(command::WRITE_AUX);
        fixture.data.write(0, &[value]);
        assert!(!fixture.is_full());
    }
}

#[test]
fn wide_reads_pad_with_ones_and_consume_one_byte() {
    let fixture = Fixture::drained();
    fixture.command(command::SELF_TEST);
    let mut data = [0; 4];
    fixture.data.read(0, &mut data);
    assert_eq!(data, [0x55, 0xff, 0xff, 0xff]);
    assert!(!fixture.is_full());
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        accesses in prop::collection::vec((any::<bool>(), any::<bool>(), 0u64..3, prop::collection::vec(any::<u8>(), 0..9)), 0..200)
    ) {
        let fixture = Fixture::new();
        for (to_data, is_write, offset, mut bytes) in accesses {
            let port = if to_data { &fixture.data } else { &fixture.command };
            if is_write {
                port.write(offset, &bytes);
            } else {
                port.read(offset, &mut bytes);
            }
        }
    }
}
