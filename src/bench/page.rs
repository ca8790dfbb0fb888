//! A report as one HTML page that needs nothing else: a table of each case, and a plot of each figure
//! with every run in it.

use std::fmt::Write;

use super::report::{Figure, Missing, Report, Summary};

/// The width of a plot's coordinates.
const WIDTH: f64 = 600.0;
const HEIGHT: f64 = 26.0;
const STYLE: &str = "\
:root{--ink:#1d2733;--soft:#66758a;--line:#dfe5ec;--card:#fff;--ground:#f4f6f9;--own:#2f6fdb;--peer:#b0701c}
@media(prefers-color-scheme:dark){:root{--ink:#e4e9f0;--soft:#93a1b5;--line:#2e3948;--card:#1a222d;\
--ground:#11171f;--own:#6aa5ff;--peer:#e0a050}}
*{box-sizing:border-box}
body{margin:0;padding:2.5rem 1.25rem;background:var(--ground);color:var(--ink);\
font:16px/1.5 system-ui,sans-serif}
main{max-width:64rem;margin:auto}
h1{font-size:1.7rem;margin:0}
header p{color:var(--soft);margin:.3rem 0 0}
section{background:var(--card);border:1px solid var(--line);border-radius:.75rem;\
padding:1.1rem 1.4rem 1.3rem;margin:1.4rem 0}
h2{font-size:1.15rem;margin:0}
h2+p{color:var(--soft);margin:.1rem 0 .6rem;font-size:.92rem}
h3{font-size:.98rem;font-weight:600;margin:1rem 0 .15rem}
.row{display:grid;grid-template-columns:7.5rem 1fr 13.5rem;gap:.9rem;align-items:center;\
font-variant-numeric:tabular-nums}
.row .by{color:var(--soft);font-size:.9rem}
.row .value{text-align:right}
.row .value small{color:var(--soft);display:block;line-height:1.25}
svg{display:block;width:100%;height:1.65rem}
.track{fill:var(--line);opacity:.55}
.own .bar,.own .run{fill:var(--own)}
.peer .bar,.peer .run{fill:var(--peer)}
.bar{opacity:.28}
.run{opacity:.75}
.own .middle{stroke:var(--own)}
.peer .middle{stroke:var(--peer)}
.middle{stroke-width:2.5}
@media(max-width:44rem){.row{grid-template-columns:1fr;gap:0}.row .value{text-align:left}}";

/// `report` as a page.
pub fn page(report: &Report) -> String {
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>alcove bench</title>\n<style>{STYLE}</style></head>\n<body><main>\n\
         <header><h1>alcove {}</h1>\n<p>{}</p>\n<p>{}; {} runs after {} to warm up. A bar ends at the \
         median, a dot is a run.</p></header>\n",
        escape(&report.alcove),
        escape(&report.host.to_string()),
        escape(&report.when),
        report.runs,
        report.warm_up
    );
    let mut cases: Vec<&str> = report.figures.iter().map(|figure| figure.case.as_str()).collect();
    cases.dedup();
    for case in cases {
        let figures: Vec<&Figure> = report.figures.iter().filter(|f| f.case == case).collect();
        let _ = writeln!(html, "<section><h2>{}</h2><p>{}</p>", escape(case), about(case));
        let mut names: Vec<&str> = Vec::new();
        for figure in &figures {
            if !names.contains(&figure.name.as_str()) {
                names.push(&figure.name);
            }
        }
        for name in names {
            let group: Vec<&Figure> = figures.iter().copied().filter(|f| f.name == name).collect();
            add_group(&mut html, name, &group, &figures);
        }
        html.push_str("</section>\n");
    }
    for Missing { case, why } in &report.missing {
        let (case, why) = (escape(case), escape(why));
        let _ = writeln!(html, "<section><h2>{case}</h2><p>Not run: {why}</p></section>");
    }
    html.push_str("</main></body></html>\n");
    html
}

/// What a case measures, in a sentence.
fn about(case: &str) -> &'static str {
    match case {
        "start" => {
            "From exec to the first byte that a guest of a few instructions prints. Less is better."
        }
        "boot" => "From exec to the first process of a Linux guest. Less is better.",
        "exits" => {
            "From the guest to a device model and back, beside a loop that only calls KVM_RUN: the \
             physical limit. Less is better."
        }
        "memory" => "Resident besides the guest's RAM, the guest idle. Less is better.",
        "disk" => {
            "An image in the host's page cache, so that the monitor is what counts. Less is better."
        }
        "net" => "TCP over a tap interface. Less is better.",
        "density" => "Idle guests side by side, started one after the other.",
        _ => "",
    }
}

/// The figures of one name: one plot each, on the scale of all of their case that count the same.
fn add_group(html: &mut String, name: &str, group: &[&Figure], all: &[&Figure]) {
    let _ = writeln!(html, "<h3>{}</h3>", escape(name));
    for figure in group {
        let alike = all.iter().filter(|other| other.unit == figure.unit);
        let largest = alike.flat_map(|other| &other.values).copied().fold(0.0, f64::max);
        let scale = if largest > 0.0 { WIDTH * 0.98 / largest } else { 0.0 };
        let Some(summary) = Summary::of(&figure.values) else { continue };
        let whose = if figure.vmm == "alcove" { "own" } else { "peer" };
        let show = |value: f64| escape(&figure.unit.show(value));
        let rate = figure.unit.rate(summary.median).map(|rate| format!("{rate} · "));
        let _ = writeln!(
            html,
            "<div class=\"row {whose}\"><span class=\"by\">{}</span>{}<span class=\"value\">{}\
             <small>{}± {:.1} %</small></span></div>",
            escape(&figure.vmm),
            plot(&figure.values, &summary, scale),
            show(summary.median),
            escape(&rate.unwrap_or_default()),
            summary.spread() * 50.0,
        );
    }
}

fn plot(values: &[f64], summary: &Summary, scale: f64) -> String {
    let middle = HEIGHT / 2.0;
    let at = |value: f64| (value * scale).clamp(0.0, WIDTH);
    let median = at(summary.median);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"{} runs\"><rect class=\"track\" y=\"{}\" width=\"{WIDTH}\" height=\"1\"/>\
         <rect class=\"bar\" y=\"5\" width=\"{median:.1}\" height=\"{}\" rx=\"2\"/>\
         <line class=\"middle\" x1=\"{median:.1}\" x2=\"{median:.1}\" y1=\"3\" y2=\"{}\"/>",
        values.len(),
        middle - 0.5,
        HEIGHT - 10.0,
        HEIGHT - 3.0,
    );
    for (index, value) in values.iter().enumerate() {
        // Side by side where they would cover each other.
        let y = middle + (index % 3) as f64 * 4.0 - 4.0;
        let _ =
            write!(svg, "<circle class=\"run\" cx=\"{:.1}\" cy=\"{y}\" r=\"2.4\"/>", at(*value));
    }
    svg.push_str("</svg>");
    svg
}

/// `text` as HTML shows it.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::super::compare::tests::report;
    use super::*;

    #[test]
    fn the_page_has_every_run_and_needs_nothing_else() {
        let page = page(&report(&[1.0, 2.0, 4.0]));

        assert_eq!(page.matches("<circle").count(), 3);
        assert!(page.contains("one &lt;that&gt; &amp; counts"), "{page}");
        assert!(page.contains("Not run: no tap"), "{page}");
        for outside in ["http:", "https:", "src=", "<script", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        let count = |tag: &str| page.matches(tag).count();
        for (open, close) in [("<section>", "</section>"), ("<div ", "</div>"), ("<svg ", "</svg>")]
        {
            assert_eq!(count(open), count(close), "{open}");
        }
    }

    #[test]
    fn bars_share_a_scale_and_stay_within() {
        let svg = plot(&[50.0, 100.0], &Summary::of(&[50.0, 100.0]).unwrap(), 5.88);

        assert!(svg.contains("width=\"441.0\""), "{svg}");
        assert!(svg.contains("cx=\"588.0\""), "{svg}");
    }
}
