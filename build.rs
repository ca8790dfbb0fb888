//! Compiles the rules of resources/seccomp into BPF programs that are part of the binary, so that a
//! start neither reads nor compiles anything.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use syscalls::x86_64::Sysno;

const FOLDER: &str = "resources/seccomp";
/// What every thread of a machine may do besides what its own file allows.
const SHARED: &str = "all";
/// The kinds of threads, each with a file of rules, and whether `all.rules` holds for them.
const KINDS: [(&str, bool); 6] = [
    ("main", true),
    ("vcpu", true),
    ("disk", true),
    ("net", true),
    ("keeper", false),
    ("janitor", false),
];
/// Stands for the process's own id, which is put in when the filter is installed.
const SELF: u32 = 0x5e1f_5e1f;

/// What is allowed: by the number of the system call, the combinations of arguments, or none for
/// all of them.
type Rules = BTreeMap<u32, Vec<Vec<Condition>>>;

/// What an argument must be.
#[derive(Clone, Copy)]
struct Condition {
    argument: u32,
    mask: u32,
    value: u32,
}

/// An instruction of classic BPF (linux/filter.h): operation, jumps, operand.
type Step = (u32, u8, u8, u32);

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const IF_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const ANSWER: u32 = libc::BPF_RET | libc::BPF_K;
/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const X86_64: u32 = 0xc000_003e;
/// Where `struct seccomp_data` has the number, the architecture and the arguments, bytes.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={FOLDER}");
    let constants = constants();
    let mut code = String::new();
    writeln!(code, "const SELF: u32 = {SELF:#x};").unwrap();
    for (kind, shares) in KINDS {
        let mut rules = Rules::new();
        read(kind, &constants, &mut rules);
        if shares {
            read(SHARED, &constants, &mut rules);
        }
        let program = program(rules);
        let name = kind.to_uppercase();
        writeln!(code, "static {name}: [sock_filter; {}] = [", program.len()).unwrap();
        for (op, jt, jf, k) in program {
            writeln!(code, "sock_filter {{ code: {op}, jt: {jt}, jf: {jf}, k: {k} }},").unwrap();
        }
        code.push_str("];\n");
    }
    write_names(&mut code);
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap()).join("seccomp.rs");
    fs::write(out, code).unwrap();
}

/// The lines of `name`.rules that say something, with their numbers.
fn lines(name: &str) -> Vec<(String, String)> {
    let path = Path::new(FOLDER).join(format!("{name}.rules"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let place = |number: usize| format!("{}:{}", path.display(), number + 1);
    let said = text.lines().enumerate().map(|(number, line)| {
        (place(number), line.split('#').next().unwrap_or_default().trim().to_owned())
    });
    said.filter(|(_, line)| !line.is_empty()).collect()
}

fn constants() -> BTreeMap<String, u32> {
    let mut constants = BTreeMap::from([("SELF".to_owned(), SELF)]);
    for (place, line) in lines("constants") {
        let Some((name, value)) = line.split_once('=') else { panic!("{place}: NAME = VALUE") };
        let value = number(value.trim(), &constants, &place);
        constants.insert(name.trim().to_owned(), value);
    }
    constants
}

/// A number, or the name of one.
fn number(text: &str, constants: &BTreeMap<String, u32>, place: &str) -> u32 {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    parsed
        .or_else(|| constants.get(text).copied())
        .unwrap_or_else(|| panic!("{place}: {text} is neither a number nor a constant"))
}

/// Adds the rules of `name`.rules: `CALL`, or `CALL: CONDITION, CONDITION …` where the arguments
/// matter.
fn read(name: &str, constants: &BTreeMap<String, u32>, rules: &mut Rules) {
    for (place, line) in lines(name) {
        let (call, conditions) = match line.split_once(':') {
            Some((call, conditions)) => (call.trim(), Some(conditions)),
            None => (line.as_str(), None),
        };
        let call: Sysno =
            call.parse().unwrap_or_else(|()| panic!("{place}: there is no system call {call}"));
        let number = call.id().cast_unsigned();
        let present = rules.get(&number);
        let is_mixed = present.is_some_and(|given| given.is_empty() != conditions.is_none());
        assert!(!is_mixed, "{place}: {call} is allowed with and without conditions");
        let given = rules.entry(number).or_default();
        if let Some(conditions) = conditions {
            let texts = conditions.split(',');
            given.push(texts.map(|text| condition(text.trim(), constants, &place)).collect());
        }
    }
}

/// `ARGUMENT == VALUE` or `ARGUMENT & MASK == VALUE`, arguments counted from 0 and taken as 32 bits
/// wide: the kernel looks at no more of those that are checked here.
fn condition(text: &str, constants: &BTreeMap<String, u32>, place: &str) -> Condition {
    const ARGUMENTS: u32 = 6;
    let words: Vec<&str> = text.split_whitespace().collect();
    let (argument, mask, value) = match words[..] {
        [argument, "==", value] => (argument, u32::MAX, value),
        [argument, "&", mask, "==", value] => (argument, number(mask, constants, place), value),
        _ => panic!("{place}: a condition is ARGUMENT == VALUE or ARGUMENT & MASK == VALUE"),
    };
    let argument = number(argument, constants, place);
    assert!(argument < ARGUMENTS, "{place}: arguments are counted from 0 to 5");
    Condition { argument, mask, value: number(value, constants, place) }
}

/// Where a comparison leads.
#[derive(Clone, Copy)]
enum Target {
    /// The next step.
    Next,
    /// The call is allowed.
    Allow,
    /// It raises SIGSYS, whose handler names it.
    Trap,
    /// The process is killed.
    Kill,
    /// A place that is given when it is known.
    Label(usize),
}

/// A program while it is put together: short, since its installation takes time for each step, of
/// which every start of a machine has several.
#[derive(Default)]
struct Program {
    steps: Vec<(u32, Target, Target, u32)>,
    /// The places of labels.
    labels: Vec<usize>,
}

/// Allows what `rules` say, and kills the process for calls of another architecture's table.
fn program(rules: Rules) -> Vec<Step> {
    let calls: Vec<(u32, Vec<Vec<Condition>>)> = rules.into_iter().collect();
    let mut program = Program::default();
    program.load(ARCHITECTURE);
    program.compare(IF_EQUAL, X86_64, Target::Next, Target::Kill);
    program.load(NUMBER);
    let mut checked = Vec::new();
    program.tree(&calls, &mut checked);
    for (label, rules) in checked {
        program.place(label);
        program.arguments(rules);
    }
    program.finish()
}

impl Program {
    fn load(&mut self, offset: u32) {
        self.steps.push((LOAD, Target::Next, Target::Next, offset));
    }

    fn compare(&mut self, operation: u32, value: u32, met: Target, unmet: Target) {
        self.steps.push((operation, met, unmet, value));
    }

    fn label(&mut self) -> usize {
        self.labels.push(usize::MAX);
        self.labels.len() - 1
    }

    fn place(&mut self, label: usize) {
        self.labels[label] = self.steps.len();
    }

    /// Finds the number in `calls`, which are sorted, by halving. Rules on arguments are left to
    /// `checked`, with the labels where they are looked for.
    fn tree<'a>(
        &mut self,
        calls: &'a [(u32, Vec<Vec<Condition>>)],
        checked: &mut Vec<(usize, &'a [Vec<Condition>])>,
    ) {
        /// So many are as well compared one by one.
        const FEW: usize = 4;
        if calls.len() > FEW {
            let (low, high) = calls.split_at(calls.len() / 2);
            let label = self.label();
            self.compare(IF_AT_LEAST, high[0].0, Target::Label(label), Target::Next);
            self.tree(low, checked);
            self.place(label);
            self.tree(high, checked);
            return;
        }
        for (index, (number, rules)) in calls.iter().enumerate() {
            let met = if rules.is_empty() {
                Target::Allow
            } else {
                let label = self.label();
                checked.push((label, rules));
                Target::Label(label)
            };
            let is_last = index + 1 == calls.len();
            self.compare(IF_EQUAL, *number, met, if is_last { Target::Trap } else { Target::Next });
        }
    }

    /// Allows a call whose arguments meet one of `rules`.
    fn arguments(&mut self, rules: &[Vec<Condition>]) {
        let mut loaded = None;
        for (index, rule) in rules.iter().enumerate() {
            let is_last = index + 1 == rules.len();
            let otherwise = if is_last { Target::Trap } else { Target::Label(self.label()) };
            for (index, Condition { argument, mask, value }) in rule.iter().enumerate() {
                // What the rules before have looked at last, if that is the same in each case.
                if loaded != Some(*argument) {
                    self.load(ARGUMENTS + argument * 8);
                }
                let is_whole = *mask == u32::MAX;
                if !is_whole {
                    self.steps.push((AND, Target::Next, Target::Next, *mask));
                }
                loaded = (is_whole && rule.len() == 1).then_some(*argument);
                let is_met = if index + 1 == rule.len() { Target::Allow } else { Target::Next };
                self.compare(IF_EQUAL, value & mask, is_met, otherwise);
            }
            if let Target::Label(label) = otherwise {
                self.place(label);
            }
        }
    }

    /// The program with its answers at the end and every target a distance.
    fn finish(self) -> Vec<Step> {
        let end = self.steps.len();
        let distance = |at: usize, target: Target| {
            let place = match target {
                Target::Next => at + 1,
                Target::Allow => end,
                Target::Trap => end + 1,
                Target::Kill => end + 2,
                Target::Label(label) => self.labels[label],
            };
            u8::try_from(place - at - 1).expect("a filter has 255 steps at the most")
        };
        let resolve = |(at, (operation, met, unmet, operand)): (usize, &(_, _, _, _))| {
            (*operation, distance(at, *met), distance(at, *unmet), *operand)
        };
        let mut steps: Vec<Step> = self.steps.iter().enumerate().map(resolve).collect();
        let answers =
            [libc::SECCOMP_RET_ALLOW, libc::SECCOMP_RET_TRAP, libc::SECCOMP_RET_KILL_PROCESS];
        steps.extend(answers.map(|answer| (ANSWER, 0, 0, answer)));
        steps
    }
}

/// The names of the system calls: all of them in one text, and where each ends, by number.
fn write_names(code: &mut String) {
    let last = Sysno::iter().map(|call| call.id()).max().unwrap();
    let (mut names, mut ends) = (String::new(), Vec::new());
    for number in 0..=last {
        names.push_str(Sysno::new(number as usize).map_or("", |call| call.name()));
        ends.push(names.len());
    }
    writeln!(code, "static NAMES: &str = {names:?};").unwrap();
    writeln!(code, "static NAME_ENDS: [u16; {}] = {ends:?};", ends.len()).unwrap();
}
