// The types of a dashboard as Grafana itself has them, for test_monitoring.py, which lets the TypeScript
// compiler check docker/grafana/vllm-lb.json against them: unknown keys, missing ones and wrong values.

import type * as common from "@grafana/schema";
import type * as raw from "@grafana/schema/dist/types/raw/dashboard/x/dashboard_types.gen.d.ts";
import type * as heatmap from
  "@grafana/schema/dist/types/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen.d.ts";
import type * as stat from
  "@grafana/schema/dist/types/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen.d.ts";
import type * as timeline from
  "@grafana/schema/dist/types/raw/composable/statetimeline/panelcfg/x/StateTimelinePanelCfg_types.gen.d.ts";
import type * as table from
  "@grafana/schema/dist/types/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen.d.ts";
import type * as timeseries from
  "@grafana/schema/dist/types/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen.d.ts";

/** A type as JSON has it: the value of a string enum in place of its name. */
type Json<T> =
  T extends string ? `${T}` : T extends (infer Item)[] ? Json<Item>[] : T extends object ? { [K in keyof T]: Json<T[K]> } : T;

/** A query of the data source for Prometheus, whose types the package does not have. */
interface PrometheusQuery {
  datasource: { type: "prometheus"; uid: "${datasource}" };
  editorMode: "code";
  expr: string;
  format?: "time_series" | "table" | "heatmap";
  instant?: boolean;
  legendFormat: string;
  range: boolean;
  refId: string;
}

type PanelOf<Type extends string, Options, Custom> =
  Omit<raw.Panel, "type" | "options" | "fieldConfig" | "targets"> & {
    type: Type;
    options: Options;
    fieldConfig: Omit<raw.FieldConfigSource, "defaults"> & {
      defaults: Omit<raw.FieldConfig, "custom"> & { custom?: Custom };
    };
    targets: PrometheusQuery[];
  };

type KnownPanel =
  | PanelOf<"heatmap", heatmap.Options, heatmap.FieldConfig>
  | PanelOf<"stat", stat.Options, never>
  | PanelOf<"state-timeline", timeline.Options, timeline.FieldConfig>
  | PanelOf<"table", table.Options, Partial<table.FieldConfig>>
  | PanelOf<"timeseries", timeseries.Options, common.GraphFieldConfig>
  | raw.RowPanel;

/** An annotation by the data source for Prometheus has keys of that source. */
type Annotation = raw.AnnotationQuery & { expr?: string; step?: string; tagKeys?: string; titleFormat?: string };

export type Dashboard = Json<
  Omit<raw.Dashboard, "panels" | "annotations" | "templating"> & {
    annotations: { list: Annotation[] };
    panels: KnownPanel[];
    templating: { list: (raw.VariableModel & { definition?: string })[] };
  }
>;
